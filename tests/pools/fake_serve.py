"""The control channel of a `farmem serve` as the interface describes it, in Python, for one client.

Leases are of an NBD server that a test has started; what the server says can be changed.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOKEN = "0123456789abcdef" * 4
EPOCH = "feedface00000001"


class FakeServe:
    """Leases of `size_bytes`, whose data is at `nbd`."""

    def __init__(self, nbd: dict[str, Any], size_bytes: int, path: Path | None = None) -> None:
        self.nbd = {"host": None, "port": None, "unix": None, "tls": False, **nbd}
        self.free_bytes = self.size_bytes = size_bytes
        self.capacity_bytes = 0  # not said
        self.ttl_ns = 900_000_000
        self.epoch = EPOCH
        self.leases: set[str] = set()
        self.asked: list[tuple[str, str, Any]] = []  # method, path, body
        self.renewals = 0
        self.refuses: dict[str, tuple[int, dict[str, str]]] = {}  # by method
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server: socketserver.BaseServer
        if path is None:
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            self.url = f"tcp://127.0.0.1:{self._server.server_address[1]}"
        else:
            self._server = socketserver.ThreadingUnixStreamServer(str(path), handler)
            self.url = f"unix://{path}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    @property
    def options(self) -> tuple[str, ...]:
        """All of it at once: there is but one export, and so one lease."""
        return ("--pool", f"{self.url}?size={self.size_bytes}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: Any, token: str) -> tuple[int, dict[str, Any]]:
        self.asked.append((method, path, body))
        if method in self.refuses:
            return self.refuses[method]
        if (method, path) == ("GET", "/v1/server"):
            sizes = {"free_bytes": self.free_bytes, "capacity_bytes": self.capacity_bytes}
            return 200, {**sizes, "extent_bytes": 2 << 20}
        if (method, path) == ("POST", "/v1/leases"):
            return self._lease(body)
        return self._of_lease(method, path.split("/")[3], token)

    def _of_lease(self, method: str, lease: str, token: str) -> tuple[int, dict[str, Any]]:
        if lease not in self.leases:
            return 404, {"error": "there is no such lease", "hint": "ask for another"}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "wrong token", "hint": ""}
        if method == "DELETE":
            self.leases.discard(lease)
            return 204, {}
        self.renewals += 1
        return 200, {"ttl_ns": self.ttl_ns, "epoch": self.epoch}

    def _lease(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["bytes"] > self.free_bytes:
            return 507, {"error": "there is not so much free", "hint": "ask for less"}
        lease = f"lease{len(self.asked)}"
        self.leases.add(lease)
        given = {"lease": lease, "token": TOKEN, "epoch": self.epoch, "ttl_ns": self.ttl_ns}
        return 201, {**given, "bytes": body["bytes"], "nbd": self.nbd}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServe

    def _do(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(size)) if size else None
        token = self.headers.get("Authorization", "")
        status, document = self.fake.answer(self.command, self.path, body, token)
        text = json.dumps(document).encode() if status != 204 else b""
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = _do

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def fake_serve(
    nbd: dict[str, Any], size_bytes: int = 256 << 20, path: Path | None = None
) -> Iterator[FakeServe]:
    server = FakeServe(nbd, size_bytes, path)
    try:
        yield server
    finally:
        server.close()
