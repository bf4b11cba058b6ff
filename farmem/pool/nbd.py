"""A client of the NBD protocol for the self-test: small, plain, and trusting nothing.

Fixed newstyle, NBD_OPT_GO, simple replies.  The client that jobs use is in C
(native/backends); this one shares nothing with it, so that each finds the other's mistakes.
"""

import asyncio
import ssl
import struct

REQUEST_SECONDS = 30.0
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_INFO_EXPORT = struct.Struct(">HQH")
_MAGIC, _OPTION_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_FLAG_FIXED, _FLAG_NO_ZEROES = 1, 2
_OPT_STARTTLS, _OPT_GO = 5, 7
_REP_ACK, _REP_INFO, _REP_ERROR = 1, 3, 1 << 31
_READ, _WRITE, _FLUSH, _TRIM = 0, 1, 3, 4
_REPLY_BYTES_MAX = 4096


class NbdError(Exception):
    """The server refused, or did not keep to the protocol."""


class NbdConnection:
    """One connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._cookie = 0

    async def open(self, export: str, tls: ssl.SSLContext | None = None) -> int:
        """The handshake; the export's size in bytes."""
        async with asyncio.timeout(REQUEST_SECONDS):
            magic, option, flags = _GREETING.unpack(await self._exactly(_GREETING.size))
            if (magic, option) != (_MAGIC, _OPTION_MAGIC) or not flags & _FLAG_FIXED:
                raise NbdError("no fixed newstyle NBD server answers")
            name = export.encode()
            data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
            self._writer.write(struct.pack(">I", _FLAG_FIXED | (flags & _FLAG_NO_ZEROES)))
            if tls is not None:
                await self._start_tls(tls)
            self._writer.write(_OPTION.pack(_OPTION_MAGIC, _OPT_GO, len(data)) + data)
            return await self._go()

    async def _start_tls(self, tls: ssl.SSLContext) -> None:
        self._writer.write(_OPTION.pack(_OPTION_MAGIC, _OPT_STARTTLS, 0))
        head = _OPTION_REPLY.unpack(await self._exactly(_OPTION_REPLY.size))
        if head != (_OPTION_REPLY_MAGIC, _OPT_STARTTLS, _REP_ACK, 0):
            raise NbdError("the server does not begin TLS")
        await self._writer.start_tls(tls)

    async def _go(self) -> int:
        size_bytes = -1
        while True:
            head = await self._exactly(_OPTION_REPLY.size)
            magic, option, kind, length = _OPTION_REPLY.unpack(head)
            if magic != _OPTION_REPLY_MAGIC or option != _OPT_GO or length > _REPLY_BYTES_MAX:
                raise NbdError("the handshake is no NBD")
            data = await self._exactly(length)
            if kind & _REP_ERROR:
                raise NbdError(f"the export was refused ({kind & ~_REP_ERROR})")
            if kind == _REP_ACK and size_bytes >= 0:
                return size_bytes
            if kind == _REP_INFO and length == _INFO_EXPORT.size:
                size_bytes = _INFO_EXPORT.unpack(data)[1]

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the export."""
        return await self._request(_READ, offset, length)

    async def write(self, offset: int, data: bytes) -> None:
        """Bytes into the export."""
        await self._request(_WRITE, offset, len(data), data)

    async def trim(self, offset: int, length: int) -> None:
        """A hole."""
        await self._request(_TRIM, offset, length)

    async def flush(self) -> None:
        """All that was written before."""
        await self._request(_FLUSH, 0, 0)

    async def _request(self, kind: int, offset: int, length: int, data: bytes = b"") -> bytes:
        self._cookie += 1
        head = _REQUEST.pack(_REQUEST_MAGIC, 0, kind, self._cookie, offset, length)
        async with asyncio.timeout(REQUEST_SECONDS):
            self._writer.write(head + data)
            await self._writer.drain()
            magic, error, cookie = _REPLY.unpack(await self._exactly(_REPLY.size))
            if magic != _REPLY_MAGIC or cookie != self._cookie:
                raise NbdError("a reply is no NBD")
            if error:
                raise NbdError(f"a request failed with error {error}")
            return await self._exactly(length) if kind == _READ else b""

    async def _exactly(self, length: int) -> bytes:
        try:
            return await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise NbdError("the server has hung up") from error
