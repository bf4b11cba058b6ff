"""A real `farmem serve` for the tests, and a client that shares nothing with it.

The server is a process of its own on loopback and on a Unix socket; its start is awaited
as systemd would, by its READY=1.  Whatever it says is kept, and looked at in the end: it
must never show a traceback, nor any token that it gave out.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from farmem.pool import nbdkit
from farmem.pool.nbd import NbdConnection
from tests.harness import FARMEM

MIB = 1 << 20
LIMIT_S = 200 if "FARMEM_GUEST" in os.environ else 20  # everything is slow in a guest
TCP, UNIX = "tcp", "unix"


def need(*programs: str) -> None:
    """Skip where a program is missing (tools/setup.sh installs it)."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def until(holds: Callable[[], Any], what: str, seconds: float = LIMIT_S) -> Any:
    """Wait for a state; a hang is a failure that says what did not come."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"{what}: did not come"
        time.sleep(0.01)
    return found


class UnixHttp(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=LIMIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(self._path)


class Data:
    """A data connection, used one call at a time."""

    def __init__(self, lease: dict[str, Any], tls: ssl.SSLContext | None = None) -> None:
        self._runner = asyncio.Runner()
        nbd = lease["nbd"]

        async def connect() -> int:
            if nbd["unix"]:
                pair = await asyncio.open_unix_connection(nbd["unix"])
            else:
                pair = await asyncio.open_connection("127.0.0.1", nbd["port"])
            self._writer = pair[1]
            self._nbd = NbdConnection(*pair)
            return await self._nbd.open(nbd["export"], tls)

        try:
            self.bytes = self._runner.run(connect())
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        return self._runner.run(self._nbd.read(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        self._runner.run(self._nbd.write(offset, data))

    def trim(self, offset: int, length: int) -> None:
        self._runner.run(self._nbd.trim(offset, length))

    def close(self) -> None:
        async def hang_up() -> None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

        if hasattr(self, "_writer"):
            self._runner.run(hang_up())
        self._runner.close()

    def __enter__(self) -> Data:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server:
    """A `farmem serve` that runs."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, notes: socket.socket) -> None:
        self.process = process
        self._log = log
        self._notes = notes
        self.tokens: set[str] = set()
        self.given: list[dict[str, Any]] = []
        self.notified: list[str] = []

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def port(self) -> int:
        found = re.search(r"listening on tcp://127\.0\.0\.1:(\d+),", self.log)
        assert found, self.log
        return int(found[1])

    @property
    def path(self) -> str:
        found = re.search(r"listening on unix://(\S+),", self.log)
        assert found, self.log
        return found[1]

    def notes(self) -> list[str]:
        """What it has told systemd so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.notified += self._notes.recv(4096).decode().split("\n")
        return self.notified

    def has_started(self) -> bool:
        assert self.process.poll() is None, self.log
        return "READY=1" in self.notes()

    def connection(self, way: str = TCP) -> http.client.HTTPConnection:
        if way == UNIX:
            return UnixHttp(self.path)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str = "",
        way: str = TCP,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        """A request; JSON is read, other text is given as it came."""
        connection = self.connection(way)
        sent = {"Authorization": f"Bearer {token}"} if token else {}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {**sent, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(text) if text and is_json else text.decode()

    def lease(self, size_bytes: int, way: str = TCP, **more: Any) -> dict[str, Any]:
        status, found = self.ask("POST", "/v1/leases", {"bytes": size_bytes, **more}, way=way)
        assert status == 201, found
        assert isinstance(found, dict)
        self.tokens.add(found["token"])
        self.given.append(found)
        return found

    def refused(self, size_bytes: int, way: str = TCP, **more: Any) -> tuple[int, str]:
        status, found = self.ask("POST", "/v1/leases", {"bytes": size_bytes, **more}, way=way)
        assert status >= 400, found
        return status, f"{found['error']}; {found['hint']}"

    def release(self, lease: dict[str, Any]) -> None:
        status, found = self.ask("DELETE", f"/v1/leases/{lease['lease']}", token=lease["token"])
        assert status == 204, found

    def renew(self, lease: dict[str, Any]) -> int:
        path = f"/v1/leases/{lease['lease']}/renew"
        return self.ask("POST", path, token=lease["token"])[0]

    def about(self) -> dict[str, Any]:
        found = self.ask("GET", "/v1/server")[1]
        assert isinstance(found, dict)
        return found

    def metrics(self) -> dict[str, float]:
        text = self.ask("GET", "/metrics")[1]
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name.removeprefix("farmem_pool_"): float(value) for name, _, value in lines}

    def uri(self, lease: dict[str, Any]) -> str:
        """The lease's data for other people's tools."""
        nbd = lease["nbd"]
        if nbd["unix"]:
            return f"nbd+unix:///{nbd['export']}?socket={nbd['unix']}"
        return f"nbd://127.0.0.1:{nbd['port']}/{nbd['export']}"

    def nbdkit(self) -> int:
        """The pid of the data process."""

        def look() -> int:
            children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
            for pid in Path(children).read_text().split():
                with contextlib.suppress(OSError):
                    if b"nbdkit" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                        return int(pid)
            return 0

        return int(until(look, "nbdkit"))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT_S)

    def check_what_it_said(self) -> None:
        log = self.log
        assert "Traceback" not in log, log
        assert not [token for token in self.tokens if token in log], log


def can_serve() -> None:
    """Skip where the data plane can't be had."""
    need("nbdkit")
    plugin = Path(nbdkit._native.__file__).with_name(nbdkit.PLUGIN)
    if not plugin.exists():
        pytest.skip("farmem was built without nbdkit's header (nbdkit-plugin-dev)")


@contextlib.contextmanager
def serving(
    *options: str,
    capacity: str = "64M",
    listens: Sequence[str] = ("127.0.0.1:0", "unix:{folder}/pool"),
    env: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
    **popen: Any,
) -> Iterator[Server]:
    """A server that is ready, on loopback and on a Unix socket; ended behind the block.

    `{folder}` in `listens` stands for one that goes with the server; `wrapper` is put before all of
    it: what runs it in a network namespace, say.
    """
    can_serve()
    with tempfile.TemporaryDirectory(prefix="farmem-serve-") as name:
        folder = Path(name)
        notes = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notes.bind(str(folder / "notify"))
        notes.setblocking(False)
        command = [*wrapper, str(FARMEM), "serve", "--capacity", capacity, "--drain-timeout", "0s"]
        for listen in listens:
            command += ["--listen", listen.replace("{folder}", name)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify"), **(env or {})},
                **popen,
            )
        server = Server(process, folder / "log", notes)
        try:
            until(server.has_started, "the server's start")
            yield server
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(LIMIT_S)
            server.check_what_it_said()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(LIMIT_S)
            notes.close()


def refuses(*options: str, env: Mapping[str, str] | None = None, **popen: Any) -> str:
    """What `farmem serve` says when it does not even start; never a traceback."""
    done = subprocess.run(
        [str(FARMEM), "serve", *options],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **(env or {})},
        check=False,
        **popen,
    )
    assert done.returncode == 125, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr
