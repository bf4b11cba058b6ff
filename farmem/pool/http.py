"""HTTP/1.1 on asyncio's streams: h11 reads and writes the protocol, limits stand on everything.

Knows nothing of leases: a handler gets a Request and gives a Response.  A peer that sends
rubbish, sends slowly, or opens too many connections costs others nothing.
"""

import asyncio
import contextlib
import json
import pwd
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import h11

from farmem import __version__
from farmem.pool.leases import Refused
from farmem.pool.sockets import Listener

HEAD_BYTES_MAX = 16 << 10
BODY_BYTES_MAX = 64 << 10
CONNECTIONS_MAX = 1024
# How long a whole request may take, and how long a connection may be idle between two.
REQUEST_SECONDS = 10.0
IDLE_SECONDS = 120.0
_READ_BYTES = 16 << 10
_UCRED = struct.Struct("iII")


class Request(NamedTuple):
    """What was asked, and by whom: user is only known on a Unix socket."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    address: str
    user: str
    is_root: bool
    listener: Listener


class Response(NamedTuple):
    """An answer."""

    status: int
    body: bytes = b""
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


Handler = Callable[[Request], Response]


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

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, listeners: list[Listener]) -> None:
        """Begin to accept."""
        for listener in listeners:

            async def serve(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                listener: Listener = listener,
            ) -> None:
                await self._serve(reader, writer, listener)

            sock = listener.control.dup()  # the loop closes its own
            server = await asyncio.start_server(serve, sock=sock, limit=HEAD_BYTES_MAX)
            self._servers.append(server)

    async def stop(self) -> None:
        """Accept no more, and hang up."""
        for server in self._servers:
            server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener: Listener
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) <= CONNECTIONS_MAX:
                await _Connection(reader, writer, listener).serve(self._handler)
        except (_Gone, OSError, asyncio.CancelledError, TimeoutError):
            pass
        except Exception:  # a bug of ours ends one connection, not the memory of everybody
            traceback.print_exc(file=sys.stderr)
        finally:
            self._connections.discard(task)
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()


class _Connection:
    """One peer; requests one after the other."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener: Listener
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._listener = listener
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._address, self._user, self._is_root = _peer_of(writer, listener)

    async def serve(self, handler: Handler) -> None:
        """Until the peer has gone, or has done something that can't be gone on from."""
        while True:
            method = ""
            try:
                request = await self._request()
                method = request.method
                response = handler(request)
            except Refused as refusal:
                response = as_error(refusal.status, refusal.what, refusal.hint)
            except h11.RemoteProtocolError as error:
                response = as_error(error.error_status_hint, f"this is no HTTP request: {error}")
            await self._send(response, method)
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
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in head.headers}
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                body = await self._body()
        except TimeoutError as error:
            raise Refused(408, "the request took too long to arrive") from error
        return Request(
            head.method.decode("latin-1"),
            head.target.decode("latin-1").partition("?")[0],
            headers,
            body,
            self._address,
            self._user,
            self._is_root,
            self._listener,
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

    async def _send(self, response: Response, method: str) -> None:
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
        body = b"" if method == "HEAD" else response.body
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
        return (str(name[0]) if name else "", "", False)
    sock = writer.get_extra_info("socket")
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid = _UCRED.unpack(found)[1]
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return "unix", name, uid == 0
