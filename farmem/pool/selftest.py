"""farmem serve --self-test: every way to the memory is used as a client would, and checked.

A real lease over HTTP, a real connection to the data, random bytes all over, holes; then the
lease is released, and nothing of it may be left: neither a way in nor a byte.
"""

import asyncio
import contextlib
import functools
import json
import os
import random
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from farmem.errors import FarmemError
from farmem.pool.initiator import Initiator
from farmem.pool.nbd import NbdConnection, NbdError
from farmem.pool.rdma import Adapter, Failed, Half, canonical_gid
from farmem.pool.server import Server, Settings
from farmem.pool.sockets import Listener, is_activated, parse_listen
from farmem.pool.tls import client_context
from farmem.sizes import format_bytes

SAMPLE_BYTES = 32 << 20
RDMA_SAMPLE_BYTES = 8 << 20
_CHUNK_BYTES = 256 << 10
_IN_FLIGHT = 4


class Path(NamedTuple):
    """A way to the memory: where to ask, and the certificate to show."""

    listener: Listener
    context: ssl.SSLContext | None


class _Wrong(Exception):
    """A check failed: what was found."""


async def run_self_test(settings: Settings) -> None:
    """Raise a FarmemError if anything is wrong."""
    with tempfile.TemporaryDirectory(prefix="farmem-self-test-") as folder:
        if not settings.listens and not is_activated():
            places = ("127.0.0.1:0", f"unix:{folder}/pool.sock")
            settings = settings._replace(listens=tuple(map(parse_listen, places)))
        server = Server(settings)
        context = client_context(settings.tls) if settings.tls.is_offered else None
        async with server.serving():
            await server.while_all_is_well(_test(server, context))
    print("all is well", flush=True)


async def _test(server: Server, context: ssl.SSLContext | None) -> None:
    ways: list[tuple[str, Callable[[], Awaitable[int]]]] = []
    for listener in server.sockets.listeners:
        path = Path(listener, None if listener.is_unix else context)
        ways.append((listener.url(), functools.partial(_test_path, server, path)))
    if server.facts.queue_pairs:
        rdma = functools.partial(_test_rdma, server, server.facts.queue_pairs.adapter, path)
        ways.append((f"RDMA through {server.facts.queue_pairs.adapter}", rdma))
    for name, test in ways:
        started = time.monotonic()
        try:
            size_bytes = await test()
        except (_Wrong, NbdError, Failed, OSError, asyncio.IncompleteReadError) as error:
            raise FarmemError(
                f"self-test of {name} failed: {error}", "don't lend from this host"
            ) from error
        ms = (time.monotonic() - started) * 1e3
        print(f"{name}: {format_bytes(size_bytes)} written, read and checked ({ms:.0f} ms)")


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise _Wrong(what)


async def _test_path(server: Server, path: Path) -> int:
    """Twice the same memory: what the first lease wrote the second must not see."""
    wanted = min(SAMPLE_BYTES, server.leases.free_bytes)
    _check(wanted > 0, "this host has no memory to lend")
    lease = await _lease(path, wanted)
    async with _connected(path, lease) as data, _connected(path, lease) as other:
        await _write_and_check(data, other, lease["bytes"])
        await _release(path, lease)
        with contextlib.suppress(NbdError):
            await data.read(0, 4096)
            raise _Wrong("a lease that has ended can still be read")
    with contextlib.suppress(NbdError):
        async with _connected(path, lease):
            raise _Wrong("a lease that has ended can still be opened")
    while server.leases.clearing_bytes:
        await asyncio.sleep(0.01)
    again = await _lease(path, wanted)
    async with _connected(path, again) as data:
        for offset in range(0, again["bytes"], _CHUNK_BYTES):
            found = await data.read(offset, _CHUNK_BYTES)
            _check(not any(found), "a new lease does not read as zeros")
    await _release(path, again)
    return int(lease["bytes"])


async def _write_and_check(data: NbdConnection, other: NbdConnection, size_bytes: int) -> None:
    """Through one connection in, through another out."""
    source = random.Random(os.urandom(8))
    chunks = {at: source.randbytes(_CHUNK_BYTES) for at in range(0, size_bytes, _CHUNK_BYTES)}
    places = list(chunks)
    source.shuffle(places)
    for start in range(0, len(places), _IN_FLIGHT):
        for at in places[start : start + _IN_FLIGHT]:
            await data.write(at, chunks[at])
    await data.flush()
    for at in reversed(places):
        _check(await other.read(at, _CHUNK_BYTES) == chunks[at], f"wrong bytes at {at}")
    at, hole = places[0], 4096
    await data.trim(at + hole, hole)
    found = await other.read(at, _CHUNK_BYTES)
    wanted = chunks[at][:hole] + bytes(hole) + chunks[at][2 * hole :]
    _check(found == wanted, "wrong bytes around a hole")


async def _test_rdma(server: Server, adapter: Adapter, path: Path) -> int:
    """One way in, the other out; and when the lease has ended, no way at all."""
    wanted = min(RDMA_SAMPLE_BYTES, server.leases.free_bytes)
    _check(wanted > 0, "this host has no memory to lend")
    lease = await _lease(path, wanted)
    size_bytes = int(lease["bytes"])
    initiator = Initiator(adapter, _CHUNK_BYTES)
    try:
        await _connect(path, lease, adapter, initiator)
        async with _connected(path, lease) as data:
            source = random.Random(os.urandom(8))
            for at in range(0, size_bytes, 2 * _CHUNK_BYTES):
                chunk, other = source.randbytes(_CHUNK_BYTES), source.randbytes(_CHUNK_BYTES)
                await initiator.write(at, chunk)
                await data.write(at + _CHUNK_BYTES, other)
                _check(await data.read(at, _CHUNK_BYTES) == chunk, f"wrong bytes at {at}")
                found = await initiator.read(at + _CHUNK_BYTES, _CHUNK_BYTES)
                _check(found == other, f"wrong bytes at {at + _CHUNK_BYTES}")
            await data.trim(0, size_bytes)
            _check(not any(await initiator.read(0, _CHUNK_BYTES)), "wrong bytes in a hole")
        await _release(path, lease)
        while server.leases.clearing_bytes:
            await asyncio.sleep(0.01)
        with contextlib.suppress(ConnectionError):
            await initiator.read(0, 4096)
            raise _Wrong("a lease that has ended can still be read")
    finally:
        initiator.close()
    return size_bytes


async def _connect(
    path: Path, lease: dict[str, Any], adapter: Adapter, initiator: Initiator
) -> None:
    target = f"/v1/leases/{lease['lease']}/queue-pairs"
    asked = {**initiator.half._asdict(), "link": adapter.link}
    status, _ = await _ask(path, "POST", target, "0" * len(lease["token"]), asked)
    _check(status == 401, "a wrong token was good enough")
    status, found = await _ask(path, "POST", target, lease["token"], asked)
    _check(status == 201, f"no queue pair was made: {found}")
    theirs = Half(*(found[key] for key in Half._fields))
    theirs = theirs._replace(gid=canonical_gid(theirs.gid))
    initiator.connect(theirs, found["rkey"], found["address"])


async def _open(path: Path, sock: socket.socket, context: ssl.SSLContext | None = None) -> Any:
    name = sock.getsockname()
    if path.listener.is_unix:
        return await asyncio.open_unix_connection(name)
    return await asyncio.open_connection(name[0], name[1], ssl=context)


@contextlib.asynccontextmanager
async def _connected(path: Path, lease: dict[str, Any]) -> AsyncIterator[NbdConnection]:
    reader, writer = await _open(path, path.listener.data)
    try:
        data = NbdConnection(reader, writer)
        size_bytes = await data.open(lease["nbd"]["export"], path.context)
        _check(size_bytes == lease["bytes"], "an export is not as large as its lease")
        yield data
    finally:
        writer.close()


async def _ask(
    path: Path, method: str, target: str, token: str = "", document: object = None
) -> tuple[int, Any]:
    """One request of HTTP, on a connection of its own."""
    reader, writer = await _open(path, path.listener.control, path.context)
    try:
        body = json.dumps(document).encode() if document is not None else b""
        head = f"{method} {target} HTTP/1.1\r\nHost: self-test\r\nConnection: close\r\n"
        head += f"Content-Length: {len(body)}\r\n"
        head += f"Authorization: Bearer {token}\r\n" if token else ""
        writer.write(f"{head}\r\n".encode() + body)
        answer = await reader.read()
    finally:
        writer.close()
    top, _, rest = answer.partition(b"\r\n\r\n")
    words = top.split(b" ", 2)
    _check(len(words) == 3 and words[1].isdigit(), f"{method} {target} was not answered")
    return int(words[1]), json.loads(rest) if rest else None


async def _lease(path: Path, wanted_bytes: int) -> dict[str, Any]:
    asked = {"bytes": wanted_bytes, "job": "self-test"}
    status, found = await _ask(path, "POST", "/v1/leases", document=asked)
    _check(status == 201, f"no lease was given: {found}")
    assert isinstance(found, dict)
    status, _ = await _ask(path, "POST", f"/v1/leases/{found['lease']}/renew", found["token"])
    _check(status == 200, "a lease could not be renewed")
    return found


async def _release(path: Path, lease: dict[str, Any]) -> None:
    target = f"/v1/leases/{lease['lease']}"
    status, _ = await _ask(path, "DELETE", target, "0" * len(lease["token"]))
    _check(status == 401, "a wrong token was good enough")
    status, _ = await _ask(path, "DELETE", target, lease["token"])
    _check(status == 204, "a lease could not be released")
