"""A registry in etcd, over the JSON gateway of its version 3: entries are keys with a lease.

Several endpoints are one cluster: they are asked in turn until one answers, the last that did
first.  Keys lie below a prefix, `PREFIX/servers/ID`.
"""

import base64
import json
import time
from typing import Any
from urllib.parse import unquote

from farmem.errors import FarmemError
from farmem.lease import Answer, Control, refusal_of
from farmem.registry import ENTRIES_MAX, HINT, Entry, Registry, entry_of
from farmem.servers import REACH_SECONDS, Server, addresses_of, parse_server, seconds_left, why

DEFAULT_PREFIX = "farmem"
_KEY_CHARACTERS_MAX = 200
_ANY_HINT = "see that etcd listens there for clients; its endpoints are told apart by commas"


class EtcdRegistry(Registry):
    """`registry+etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`."""

    def __init__(self, url: str, rest: str) -> None:
        super().__init__(url)
        places, _, prefix = rest.partition("/")
        try:
            self._servers = [parse_server(f"tcp://{place}") for place in places.split(",")]
        except FarmemError as error:
            raise FarmemError(f"registry {url!r} is not understood: {error.what}", HINT) from error
        prefix = unquote(prefix).strip("/") or DEFAULT_PREFIX
        if "?" in rest or len(prefix) > _KEY_CHARACTERS_MAX or not prefix.isprintable():
            raise FarmemError(f"registry {url!r} has a prefix that can't be used", HINT)
        self._folder = f"/{prefix}/servers/"
        self._leases: dict[str, str] = {}

    def register(self, entry: Entry, ttl_seconds: float, deadline: float) -> None:
        """A new lease of etcd's, and the key with it."""
        answer = self._ask("lease/grant", {"TTL": max(round(ttl_seconds), 1)}, deadline)
        lease = answer.get("ID")
        if not isinstance(lease, str) or not lease.lstrip("-").isdigit():
            raise FarmemError(f"registry {self.url!r}: etcd granted no lease", _ANY_HINT)
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
        end = self._folder[:-1] + chr(ord("/") + 1)
        question = {"key": _coded(self._folder), "range_end": _coded(end), "limit": ENTRIES_MAX}
        found = self._ask("kv/range", question, deadline).get("kvs", [])
        entries = (self._entry(pair) for pair in found if isinstance(pair, dict))
        return [entry for entry in entries if entry is not None]

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
        failures = []
        for number, server in enumerate(tuple(self._servers)):
            try:
                share = seconds_left(deadline) / (len(self._servers) - number)
                answer = _call(server, what, question, time.monotonic() + share)
            except OSError as error:
                failures.append(f"{server.name}: {why(error)}")
                continue
            if answer.status in (500, 503, 504) and number + 1 < len(self._servers):
                failures.append(f"{server.name}: {_said(answer)}")  # it has no leader, say
                continue
            self._servers.remove(server)
            self._servers.insert(0, server)
            if answer.status != 200:
                raise FarmemError(f"registry {self.url!r}: etcd said: {_said(answer)}", _ANY_HINT)
            return answer.document
        raise FarmemError(
            f"registry {self.url!r} can't be reached: {'; '.join(failures)}", _ANY_HINT
        )


def _call(server: Server, what: str, question: dict[str, Any], deadline: float) -> Answer:
    control = Control(server, addresses_of(server, deadline))
    try:
        return control.call("POST", f"/v3/{what}", deadline, question)
    except FarmemError as error:
        raise ConnectionError("what answers there is no etcd") from error


def _said(answer: Answer) -> str:
    return refusal_of(answer)[0]


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
