"""A registry that a `farmem serve --registry` keeps, asked over its control channel.  With TLS
both sides show a certificate, as for leases.

A server's entry is its own by a secret that it chooses when it starts: nobody else can change or
withdraw it.
"""

import secrets
import time
from typing import Any

from farmem.errors import FarmemError
from farmem.lease import Answer, refusal_of, unreachable
from farmem.registry import HINT, Entry, Registry, entry_of
from farmem.servers import REACH_SECONDS, parse_server

_NS = 1_000_000_000
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
        self._call("PUT", f"/v1/registry/{entry.id}", deadline, document)

    def withdraw(self, entry: Entry, deadline: float) -> None:
        """List it no more."""
        self._call("DELETE", f"/v1/registry/{entry.id}", deadline)

    def entries(self, deadline: float) -> list[Entry]:
        """All that are listed."""
        found = self._call("GET", "/v1/registry", deadline).document.get("servers")
        servers = found if isinstance(found, dict) else {}
        entries = (entry_of(number, document) for number, document in servers.items())
        return [entry for entry in entries if entry is not None]

    def _call(self, method: str, path: str, deadline: float, body: Any = None) -> Answer:
        deadline = min(deadline, time.monotonic() + REACH_SECONDS)
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
