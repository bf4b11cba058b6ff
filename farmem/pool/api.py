"""The control plane's requests: leases for whoever asks properly, figures for everybody.

A lease's token is told once, to whoever was granted the lease, and stands nowhere else.
"""

import json
import re
import time
from collections.abc import Awaitable
from typing import Any
from urllib.parse import parse_qsl

from farmem import __version__
from farmem.pool import metrics
from farmem.pool.directory import WAIT_NS_MAX, Directory
from farmem.pool.facts import Facts
from farmem.pool.http import Handler, Request, Response, as_error, as_json
from farmem.pool.leases import Lease, Refused
from farmem.pool.queuepairs import QueuePairs
from farmem.pools import EXTENT_BYTES
from farmem.running import printable
from farmem.sizes import BYTES_MAX, format_bytes

TEXT_CHARACTERS_MAX = 200
_LEASE = re.compile(r"/v1/leases/([0-9a-f]{1,64})(/renew)?")
_QUEUE_PAIRS = re.compile(r"/v1/leases/([0-9a-f]{1,64})/queue-pairs(?:/([0-9a-f]{1,64}))?")
_REGISTERED = re.compile(r"/v1/registry/([0-9a-f]{1,64})")
_EXAMPLE = 'send JSON, as {"bytes": 1073741824, "job": "my job", "tenant": "my name"}'
_BEARER = "bearer "
_DIGITS_MAX = 12
_NS = 1_000_000_000


class Api:
    """The routes, and what is answered."""

    def __init__(self, server: Facts) -> None:
        self._server = server
        self._leases = server.leases
        self._routes: dict[str, dict[str, Handler]] = {
            "/healthz": {"GET": self._health},
            "/metrics": {"GET": self._metrics},
            "/v1/server": {"GET": self._about},
            "/v1/leases": {"POST": self._grant},
        }
        if server.directory is not None:
            directory = server.directory
            self._routes["/v1/registry"] = {"GET": lambda asked: _list(directory, asked)}

    def answer(self, request: Request) -> Response | Awaitable[Response]:
        """The answer to a request; what can't be done is a Refused."""
        if "origin" in request.headers:
            # Else any page that somebody here looks at could take leases with their browser.
            raise Refused(403, "a web page can't ask for leases", "ask from a program")
        methods = self._routes.get(request.path) or self._of_a_lease(request.path)
        match = _REGISTERED.fullmatch(request.path)
        if match and self._server.directory is not None:
            methods = _registered(self._server.directory, match[1])
        if not methods:
            return as_error(
                404,
                "there is nothing here",
                "ask /healthz, /metrics, /v1/server, /v1/leases or /v1/leases/ID",
            )
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            allowed = ", ".join(methods)
            refusal = as_error(405, f"{request.method} can't be done here", f"methods: {allowed}")
            return refusal._replace(headers=(("Allow", allowed),))
        return methods[method](request)

    def _of_a_lease(self, path: str) -> dict[str, Handler]:
        """The methods of a path below a lease."""
        if match := _LEASE.fullmatch(path):
            lease_id = match[1]
            if match[2]:
                return {"POST": lambda asked: self._renew(asked, lease_id)}
            return {"DELETE": lambda asked: self._end(asked, lease_id)}
        if match := _QUEUE_PAIRS.fullmatch(path):
            lease_id, name = match[1], match[2]
            if name:
                return {"DELETE": lambda asked: self._disconnect(asked, lease_id, name)}
            return {"POST": lambda asked: self._connect(asked, lease_id)}
        return {}

    def _health(self, request: Request) -> Response:
        return as_json(200, {"status": "draining" if self._leases.is_draining else "ok"})

    def _metrics(self, request: Request) -> Response:
        return Response(200, metrics.text_of(self._server).encode(), metrics.KIND)

    def _about(self, request: Request) -> Response:
        document = {
            "name": self._server.name,
            "version": __version__,
            "epoch": self._server.epoch,
            "capacity_bytes": self._leases.capacity_bytes,
            "free_bytes": self._leases.free_bytes,
            "extent_bytes": EXTENT_BYTES,
            "leases": len(self._leases.live),
            "draining": self._leases.is_draining,
            "data": ["nbd"],
        }
        if self._server.queue_pairs:
            document |= {"data": ["nbd", "rdma"], "rdma": self._server.queue_pairs.about()}
        return as_json(200, document)

    def _grant(self, request: Request) -> Response:
        asked = _object_in(request.body)
        size_bytes = asked.get("bytes")
        if isinstance(size_bytes, bool) or not isinstance(size_bytes, int):
            raise Refused(400, "bytes is not a whole number", _EXAMPLE)
        if not 0 < size_bytes <= BYTES_MAX - EXTENT_BYTES:
            raise Refused(400, f"bytes is {size_bytes}, and must be positive", _EXAMPLE)
        tenant = _tenant_of(request, _text_in(asked, "tenant"))
        job = _text_in(asked, "job")
        lease = self._leases.grant(size_bytes, tenant, job, time.monotonic_ns())
        self._server.say(f"lease {lease.id}: {_described(lease)}")
        document = {
            "lease": lease.id,
            "token": lease.token,
            "epoch": self._server.epoch,
            "bytes": lease.size_bytes,
            "ttl_ns": self._leases.ttl_ns,
            "nbd": {
                "host": None,
                "port": request.listener.data_port,
                "unix": request.listener.data_path,
                "export": lease.token,
                "tls": request.is_tls,
            },
        }
        if self._server.queue_pairs:
            document["rdma"] = self._server.queue_pairs.about()
        return as_json(201, document)

    def _renew(self, request: Request, lease_id: str) -> Response:
        lease = self._leases.find(lease_id, _token_of(request))
        self._leases.renew(lease, time.monotonic_ns())
        return as_json(200, {"ttl_ns": self._leases.ttl_ns, "epoch": self._server.epoch})

    def _end(self, request: Request, lease_id: str) -> Response:
        lease = self._leases.find(lease_id, _token_of(request))
        self._leases.end(lease, "released")
        self._server.say(f"lease {lease.id}: released")
        return Response(204)

    def _rdma(self) -> QueuePairs:
        if self._server.queue_pairs is None:
            raise Refused(
                409, "this server has no RDMA", "use its TCP port: farmem run --pool tcp://..."
            )
        return self._server.queue_pairs

    async def _connect(self, request: Request, lease_id: str) -> Response:
        asked = _object_in(request.body)
        return as_json(201, await self._rdma().connect(lease_id, _token_of(request), asked))

    def _disconnect(self, request: Request, lease_id: str, name: str) -> Response:
        lease = self._leases.find(lease_id, _token_of(request))
        self._rdma().disconnect(lease, name)
        return Response(204)


async def _list(directory: Directory, request: Request) -> Response:
    """At once, or when it is another version than the one that is known."""
    asked = dict(parse_qsl(request.query))
    if "version" in asked:
        wait = asked.get("wait_ns", "")
        is_number = wait.isascii() and wait.isdigit() and len(wait) <= _DIGITS_MAX
        if not is_number or int(wait) > WAIT_NS_MAX:
            example = "write it as /v1/registry?version=VERSION&wait_ns=20000000000"
            raise Refused(400, f"wait_ns must be a number up to {WAIT_NS_MAX}", example)
        await directory.wait(asked["version"], int(wait) / _NS)
    entries = directory.entries(time.monotonic())
    servers = {entry.id: entry.document() for entry in entries}
    return as_json(200, {"servers": servers, "version": directory.version})


def _registered(directory: Directory, number: str) -> dict[str, Handler]:
    def put(request: Request) -> Response:
        token, asked = _token_of(request), _object_in(request.body)
        return as_json(200, {"ttl_ns": directory.put(number, token, asked, time.monotonic())})

    def withdraw(request: Request) -> Response:
        directory.withdraw(number, _token_of(request), time.monotonic())
        return Response(204)

    return {"PUT": put, "DELETE": withdraw}


def _described(lease: Lease) -> str:
    job = f" for {printable(lease.job)!r}" if lease.job else ""
    return f"{format_bytes(lease.size_bytes)} to {printable(lease.tenant)!r}{job}"


def _object_in(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON", _EXAMPLE) from error
    if not isinstance(found, dict):
        raise Refused(400, "the body is no JSON object", _EXAMPLE)
    return found


def _text_in(asked: dict[str, Any], key: str) -> str:
    found = asked.get(key)
    if found is None:
        return ""
    if not isinstance(found, str) or len(found) > TEXT_CHARACTERS_MAX or not found.isprintable():
        most = f"printable text of at most {TEXT_CHARACTERS_MAX} characters"
        raise Refused(400, f"{key} must be {most}", _EXAMPLE)
    return found


def _tenant_of(request: Request, claimed: str) -> str:
    """Whose lease it is.

    On a Unix socket the kernel says who asks, with TLS the certificate; else it is a claim.
    """
    if not request.user:
        return claimed or request.address
    if claimed and claimed != request.user and not request.is_root:
        raise Refused(
            403,
            f"you are {request.user!r} here, and can't be tenant {claimed!r}",
            f'leave "tenant" out, or say {request.user!r}',
        )
    return claimed or request.user


def _token_of(request: Request) -> str:
    found = request.headers.get("authorization", "")
    if not found.lower().startswith(_BEARER):
        raise Refused(401, "there is no token", "send: Authorization: Bearer TOKEN")
    return found[len(_BEARER) :].strip()
