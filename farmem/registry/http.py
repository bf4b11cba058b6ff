"""A registry that a `farmem serve --registry` keeps, asked over its control channel.  With TLS
both sides show a certificate, as for leases.

A server's entry is its own by a secret that it chooses when it starts: nobody else can change or
withdraw it.
"""

import secrets
import time
from typing import Any
from urllib.parse import urlencode

from farmem.errors import FarmemError
from farmem.lease import Answer, refusal_of, unreachable
from farmem.registry import HINT, POLL_SECONDS, Entry, Registry, entry_of, ids_of
from farmem.servers import REACH_SECONDS, parse_server

_NS = 1_000_000_000
_PATH = "/v1/registry"
_WAIT_SECONDS = 20.0
_NO_REGISTRY = "start the server there with --registry, or name another"


class HttpRegistry(Registry):
    """`registry+http://HOST:PORT`, or `registry+https:`."""

    def __init__(self, url: str, rest: str, *, is_tls: bool) -> None:
        super().__init__(url)
        place = self._without_parameters(rest, is_tls)
        try:
            self._server = parse_server(f"tcp://{place}")._replace(is_tls=is_tls)
        except FarmemError as error:
            raise FarmemError(f"{self.name} is not understood", HINT) from error
        self._servers = [self._server]
        self._secret = secrets.token_hex(32)

    def register(self, entry: Entry, ttl_seconds: float, deadline: float) -> None:
        """List a server, or renew it: to this registry it is the same."""
        document = {**entry.document(), "ttl_ns": int(ttl_seconds * _NS)}
        self._call("PUT", f"{_PATH}/{entry.id}", deadline, document)

    def withdraw(self, entry: Entry, deadline: float) -> None:
        """List it no more."""
        self._call("DELETE", f"{_PATH}/{entry.id}", deadline)

    def entries(self, deadline: float) -> list[Entry]:
        """All that are listed."""
        return _entries_of(self._call("GET", _PATH, deadline).document)

    def watch(self, known: list[Entry], deadline: float) -> list[Entry]:
        """The server answers when others are listed.  One that answers at once, because too many
        wait there, is asked again later."""
        version, seconds = "", 0.0
        while True:
            begin = time.monotonic()
            answer = self._call("GET", _path(version, seconds), begin + REACH_SECONDS, wait=seconds)
            found, now = _entries_of(answer.document), time.monotonic()
            if ids_of(found) != ids_of(known) or now >= deadline:
                return found
            told = answer.document.get("version")
            version = told if isinstance(told, str) else ""
            if now - begin < min(seconds, POLL_SECONDS) or not version:
                time.sleep(min(POLL_SECONDS, deadline - now))
            seconds = max(min(deadline - time.monotonic(), _WAIT_SECONDS), 0.0)

    def _call(
        self, method: str, path: str, deadline: float, body: Any = None, wait: float = 0.0
    ) -> Answer:
        """`wait`: how long it may take the server to find an answer."""
        deadline = min(deadline, time.monotonic() + REACH_SECONDS) + wait
        try:
            control = self._control(self._server, deadline)
            token = self._secret if method != "GET" else ""
            answer = control.call(method, path, deadline, body, token)
        except OSError as error:
            raise unreachable(self._server, error, self.name) from error
        if answer.status == 404 and method != "DELETE":
            raise FarmemError(f"{self._server.name} keeps no registry", _NO_REGISTRY)
        if answer.status // 100 != 2:
            what, hint = refusal_of(answer)
            raise FarmemError(f"{self.name}: {what}", hint)
        return answer


def _path(version: str, seconds: float) -> str:
    if not version:
        return _PATH
    return f"{_PATH}?{urlencode({'version': version, 'wait_ns': int(seconds * _NS)})}"


def _entries_of(document: dict[str, Any]) -> list[Entry]:
    found = document.get("servers")
    servers = found if isinstance(found, dict) else {}
    entries = (entry_of(number, document) for number, document in servers.items())
    return [entry for entry in entries if entry is not None]
