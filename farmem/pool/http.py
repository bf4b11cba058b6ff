"""HTTP/1.1 on asyncio's streams: h11 reads and writes the protocol, limits stand on everything.

Knows nothing of leases: a handler gets a Request and gives a Response.  A peer that sends
rubbish, sends slowly, or opens too many connections costs others nothing.
"""

import asyncio
import contextlib
import json
import pwd
import socket
import ssl
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import h11

from farmem import __version__
from farmem.pool.leases import Refused
from farmem.pool.sockets import Listener
from farmem.pool.tls import (
    FIRST_BYTE,
    HANDSHAKE_SECONDS,
    OFF,
    REQUIRE,
    Tls,
    name_in,
    server_context,
)

HEAD_BYTES_MAX = 16 << 10
BODY_BYTES_MAX = 64 << 10
CONNECTIONS_MAX = 1024
# How long a whole request may take, and how long a connection may be idle between two.
REQUEST_SECONDS = 10.0
IDLE_SECONDS = 120.0
_READ_BYTES = 16 << 10
_ACCEPT_AGAIN_SECONDS = 0.1
_UCRED = struct.Struct("iII")


class Request(NamedTuple):
    """What was asked, and by whom: user is known on a Unix socket and by a certificate."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    address: str
    user: str
    is_root: bool
    is_tls: bool
    listener: Listener
    query: str = ""


class Response(NamedTuple):
    """An answer."""

    status: int
    body: bytes = b""
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


# What takes time (pages to bring) is awaited, and others are answered meanwhile.
Handler = Callable[[Request], Response | Awaitable[Response]]


class _Gone(Exception):
    """The peer has closed, or has been idle for too long."""


def as_json(status: int, document: object) -> Response:
    """An object as an answer."""
    return Response(status, json.dumps(document, indent=1).encode() + b"\n")


def as_error(status: int, what: str, hint: str = "") -> Response:
    """What was wrong, and what to do instead."""
    extra = (("WWW-Authenticate", "Bearer"),) if status == 401 else ()
    return as_json(status, {"error": what, "hint": hint})._replace(headers=extra)


class HttpServer:
    """Serves a handler on the control sockets."""

    def __init__(self, handler: Handler, tls: Tls) -> None:
        self._handler = handler
        self._tls = tls
        self._context = server_context(tls) if tls.is_offered else None
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, listeners: list[Listener]) -> None:
        """Begin to accept."""
        for listener in listeners:
            sock = listener.control.dup()  # what is closed in the end is our own
            sock.setblocking(False)
            self._accepting.append(asyncio.ensure_future(self._accept(sock, listener)))

    async def _accept(self, sock: socket.socket, listener: Listener) -> None:
        """Take connections, for ever."""
        loop = asyncio.get_running_loop()
        with sock:
            while True:
                try:
                    peer, _ = await loop.sock_accept(sock)
                except OSError:  # the peer has gone again, or descriptors have run out
                    await asyncio.sleep(_ACCEPT_AGAIN_SECONDS)
                    continue
                task = asyncio.ensure_future(self._serve(peer, listener))
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)

    async def accepting(self) -> None:
        """For ever, unless that fails."""
        await asyncio.gather(*self._accepting)

    async def stop(self) -> None:
        """Accept no more, and hang up."""
        tasks = [*self._accepting, *self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, peer: socket.socket, listener: Listener) -> None:
        mode = self._tls.mode if self._context and not listener.is_unix else OFF
        writer = None
        try:
            if len(self._connections) > CONNECTIONS_MAX:
                return
            is_tls = mode != OFF and await _begins_with_tls(peer)
            reader, writer = await _streams(peer, self._context if is_tls else None)
            handler = self._handler if is_tls or mode != REQUIRE else _refuse_plain
            await _Connection(reader, writer, listener).serve(handler)
        except (_Gone, OSError, TimeoutError):
            pass
        except Exception:  # a bug of ours ends one connection, not the memory of everybody
            traceback.print_exc(file=sys.stderr)
        finally:
            with contextlib.suppress(OSError, RuntimeError):
                (writer or peer).close()


async def _begins_with_tls(peer: socket.socket) -> bool:
    """Whether a client speaks TLS, from its first byte, which stays where it is."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(peer, readable.set)
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await readable.wait()
    finally:
        loop.remove_reader(peer)
    return peer.recv(1, socket.MSG_PEEK) == FIRST_BYTE


def _refuse_plain(request: Request) -> Response:
    raise Refused(
        403,
        "this server is spoken to with TLS alone",
        "ask https://, with a certificate; farmem run: say --tls=require --tls-certificates FOLDER",
    )


async def _streams(
    peer: socket.socket, context: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """asyncio's streams on a socket that was accepted."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=HEAD_BYTES_MAX)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol,
        peer,
        ssl=context,
        ssl_handshake_timeout=HANDSHAKE_SECONDS if context else None,
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class _Connection:
    """One peer; requests one after the other."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener: Listener
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._listener = listener
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._is_tls = writer.get_extra_info("sslcontext") is not None
        self._method = ""  # of the request that is looked at, once that is known
        self._address, self._user, self._is_root = _peer_of(writer, listener)

    async def serve(self, handler: Handler) -> None:
        """Until the peer has gone, or has done something that can't be gone on from."""
        while True:
            self._method = ""
            try:
                request = await self._request()
                answer = handler(request)
                response = answer if isinstance(answer, Response) else await answer
            except Refused as refusal:
                response = as_error(refusal.status, refusal.what, refusal.hint)
            except h11.RemoteProtocolError as error:
                response = as_error(error.error_status_hint, f"this is no HTTP request: {error}")
            await self._send(response)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _event(self) -> "h11.Event | type[h11.PAUSED]":
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]  # all that is left
            if self._http.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                self._writer.write(self._http.send(go_on) or b"")
            self._http.receive_data(await self._reader.read(_READ_BYTES))

    async def _request(self) -> Request:
        async with asyncio.timeout(IDLE_SECONDS):
            head = await self._event()
        if not isinstance(head, h11.Request):
            raise _Gone
        self._method = head.method.decode("latin-1")
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in head.headers}
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                body = await self._body()
        except TimeoutError as error:
            raise Refused(408, "the request took too long to arrive") from error
        path, _, query = head.target.decode("latin-1").partition("?")
        return Request(
            self._method,
            path,
            headers,
            body,
            self._address,
            self._user,
            self._is_root,
            self._is_tls,
            self._listener,
            query,
        )

    async def _body(self) -> bytes:
        body = b""
        while True:
            event = await self._event()
            if isinstance(event, h11.EndOfMessage):
                return body
            if not isinstance(event, h11.Data):
                raise _Gone
            body += event.data
            if len(body) > BODY_BYTES_MAX:
                raise Refused(413, f"the body is longer than {BODY_BYTES_MAX} bytes")

    async def _send(self, response: Response) -> None:
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [
            ("Content-Type", response.kind),
            ("Server", f"farmem/{__version__}"),
            ("Cache-Control", "no-store"),
            *response.headers,
        ]
        if response.status != 204:
            headers.append(("Content-Length", str(len(response.body))))
        body = b"" if self._method == "HEAD" else response.body
        head = h11.Response(status_code=response.status, headers=headers)
        data = self._http.send(head) or b""
        data += self._http.send(h11.Data(data=body)) or b"" if body else b""
        data += self._http.send(h11.EndOfMessage()) or b""
        self._writer.write(data)
        async with asyncio.timeout(REQUEST_SECONDS):
            await self._writer.drain()


def _peer_of(writer: asyncio.StreamWriter, listener: Listener) -> tuple[str, str, bool]:
    """A peer's address, its user where the kernel knows it, and whether that is root."""
    if not listener.is_unix:
        name = writer.get_extra_info("peername")
        certificate = writer.get_extra_info("peercert")
        user = name_in(certificate) if certificate else ""
        return (str(name[0]) if name else "", user, False)
    sock = writer.get_extra_info("socket")
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid = _UCRED.unpack(found)[1]
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return "unix", name, uid == 0
