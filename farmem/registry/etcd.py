"""A registry in etcd, over the JSON gateway of its version 3: entries are keys with a lease.

Several endpoints are one cluster: they are asked in turn until one answers, the last that did
first.  Keys lie below a prefix, `PREFIX/servers/ID`.  TLS as `etcd --client-cert-auth` wants it.
"""

import base64
import json
import time
from typing import Any
from urllib.parse import unquote

from farmem.errors import FarmemError
from farmem.lease import Answer, Stranger, no_answer, refusal_of
from farmem.registry import ENTRIES_MAX, HINT, POLL_SECONDS, Entry, Registry, entry_of, ids_of
from farmem.servers import REACH_SECONDS, Server, parse_server, seconds_left
from farmem.tls import HOW_TO, NoTls

DEFAULT_PREFIX = "farmem"
_KEY_CHARACTERS_MAX = 200
_ANY_HINT = "see that etcd listens there for clients; its endpoints are told apart by commas"
_TLS_HINT = (
    "start etcd with --cert-file, --key-file, --client-cert-auth and --trusted-ca-file, "
    "or write registry+etcd:, and ?tls=off behind it"
)
# The gateway speaks to etcd itself, as a client that shows etcd's own certificate.
_GATEWAY_HINT = (
    "if it goes on: etcd's own certificate must be for clients too (extendedKeyUsage clientAuth)"
)


class _Passed(FarmemError):
    """An endpoint that is of no use; another one may be."""


class EtcdRegistry(Registry):
    """`registry+etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`, or `registry+etcds:`."""

    def __init__(self, url: str, rest: str, *, is_tls: bool) -> None:
        super().__init__(url)
        places, _, prefix = self._without_parameters(rest, is_tls).partition("/")
        try:
            servers = [parse_server(f"tcp://{place}") for place in places.split(",")]
        except FarmemError as error:
            raise FarmemError(f"{self.name} is not understood: {error.what}", HINT) from error
        self._servers = [server._replace(is_tls=is_tls) for server in servers]
        prefix = unquote(prefix).strip("/") or DEFAULT_PREFIX
        if len(prefix) > _KEY_CHARACTERS_MAX or not prefix.isprintable():
            raise FarmemError(f"{self.name} has a prefix that can't be used", HINT)
        self._folder = f"/{prefix}/servers/"
        self._leases: dict[str, str] = {}

    def register(self, entry: Entry, ttl_seconds: float, deadline: float) -> None:
        """A new lease of etcd's, and the key with it."""
        answer = self._ask("lease/grant", {"TTL": max(round(ttl_seconds), 1)}, deadline)
        lease = answer.get("ID")
        if not isinstance(lease, str) or not lease.lstrip("-").isdigit():
            raise FarmemError(f"{self.name}: etcd granted no lease", _ANY_HINT)
        self._leases[entry.id] = lease
        self._put(entry, deadline)

    def renew(self, entry: Entry, ttl_seconds: float, deadline: float) -> None:
        """Keep the lease alive; one that has ended (etcd was away for long) is made anew."""
        lease = self._leases.get(entry.id)
        if lease is not None:
            answer = self._ask("lease/keepalive", {"ID": lease}, deadline).get("result")
            seconds = answer.get("TTL") if isinstance(answer, dict) else None
            if isinstance(seconds, str) and seconds.isdigit() and int(seconds) > 0:
                self._put(entry, deadline)
                return
        self.register(entry, ttl_seconds, deadline)

    def withdraw(self, entry: Entry, deadline: float) -> None:
        """End the lease, and the key with it."""
        lease = self._leases.pop(entry.id, None)
        if lease is not None:
            self._ask("lease/revoke", {"ID": lease}, deadline)

    def entries(self, deadline: float) -> list[Entry]:
        """The keys below the prefix."""
        return self._listed(deadline)[0]

    def watch(self, known: list[Entry], deadline: float) -> list[Entry]:
        """etcd says what has happened since a revision; a renewal is nothing."""
        while True:
            begin = time.monotonic()
            found, revision = self._listed(begin + REACH_SECONDS)
            if ids_of(found) != ids_of(known) or time.monotonic() >= deadline:
                return found
            if not self._has_changed(revision + 1, deadline):
                end = min(begin + POLL_SECONDS, deadline)
                time.sleep(max(end - time.monotonic(), 0.0))

    def _range(self) -> dict[str, Any]:
        """What all keys below the prefix are to etcd."""
        end = self._folder[:-1] + chr(ord("/") + 1)
        return {"key": _coded(self._folder), "range_end": _coded(end)}

    def _listed(self, deadline: float) -> tuple[list[Entry], int]:
        """And etcd's revision then."""
        answer = self._ask("kv/range", self._range() | {"limit": ENTRIES_MAX}, deadline)
        pairs = (pair for pair in answer.get("kvs", []) if isinstance(pair, dict))
        entries = (self._entry(pair) for pair in pairs)
        header = answer.get("header")
        revision = str(header.get("revision", "")) if isinstance(header, dict) else ""
        found = [entry for entry in entries if entry is not None]
        return found, int(revision) if revision.isascii() and revision.isdigit() else 0

    def _has_changed(self, revision: int, deadline: float) -> bool:
        """Whether a key came or went since then, as soon as one does; not: the endpoint that
        answered last does not tell."""
        question = {"create_request": self._range() | {"start_revision": str(revision)}}
        try:
            control = self._control(self._servers[0], time.monotonic() + REACH_SECONDS)
            told = control.follow("/v3/watch", question, deadline)
            return any(_is_change(document.get("result")) for document in told)
        except (OSError, FarmemError):
            return False

    def _entry(self, pair: dict[str, Any]) -> Entry | None:
        try:
            key = base64.b64decode(pair["key"]).decode()
            document = json.loads(base64.b64decode(pair["value"]))
        except (KeyError, TypeError, ValueError):
            return None
        return entry_of(key.removeprefix(self._folder), document)

    def _put(self, entry: Entry, deadline: float) -> None:
        value = _coded(json.dumps(entry.document()))
        key = _coded(self._folder + entry.id)
        question = {"key": key, "value": value, "lease": self._leases[entry.id]}
        self._ask("kv/put", question, deadline)

    def _ask(self, what: str, question: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Of the first endpoint that answers."""
        deadline = min(deadline, time.monotonic() + REACH_SECONDS)
        failures: list[_Passed] = []
        for number, server in enumerate(tuple(self._servers)):
            try:
                share = seconds_left(deadline) / (len(self._servers) - number)
                answer = self._answer(server, what, question, time.monotonic() + share)
            except OSError as error:
                failures.append(_Passed(no_answer(server, error), _ANY_HINT))
                continue
            except _Passed as error:
                failures.append(error)
                continue
            self._servers = [server, *(other for other in self._servers if other is not server)]
            if answer.status != 200:
                raise FarmemError(f"{self.name}: etcd said: {_said(answer)}", _ANY_HINT)
            return answer.document
        told = "; ".join(failure.what for failure in failures)
        raise FarmemError(f"{self.name}: {told}", failures[0].hint)

    def _answer(
        self, server: Server, what: str, question: dict[str, Any], deadline: float
    ) -> Answer:
        """Of one endpoint.  What is wrong on our side is wrong for all of them."""
        control = self._control(server, deadline)
        try:
            answer = control.call("POST", f"/v3/{what}", deadline, question)
        except Stranger as error:
            told = f"what answers at {server.name} is no etcd"
            if control.is_tls:
                raise _Passed(told, _ANY_HINT) from error
            raise _Passed(f"{told}, or wants TLS", f"{_ANY_HINT}; for TLS {HOW_TO}") from error
        except NoTls as error:
            raise _Passed(error.what, _TLS_HINT) from error
        except FarmemError as error:
            raise _Passed(error.what, error.hint) from error
        if answer.status in (500, 503, 504):  # it has no leader, say
            hint = _GATEWAY_HINT if control.is_tls else _ANY_HINT
            raise _Passed(f"{server.name}: etcd said: {_said(answer)}", hint)
        return answer


def _is_change(result: Any) -> bool:
    """A key that was made, or is gone; none that was only written anew."""
    events = result.get("events") if isinstance(result, dict) else None
    for event in events if isinstance(events, list) else []:
        pair = event.get("kv") if isinstance(event, dict) else None
        if isinstance(pair, dict):
            is_new = pair.get("create_revision") == pair.get("mod_revision")
            if event.get("type") == "DELETE" or is_new:
                return True
    return False


def _said(answer: Answer) -> str:
    return refusal_of(answer)[0]


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
