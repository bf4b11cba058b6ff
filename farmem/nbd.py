"""What an NBD server's export is, asked before the program starts.

The engine speaks to the server itself (native/backends/nbd*.c); here is only the
beginning of a connection, so that a wrong name, a server that wants TLS or an export that
can't be used is an error in words, and not a job that goes wrong.
"""

import contextlib
import socket
import struct
from typing import NamedTuple

from farmem.errors import FarmemError
from farmem.servers import receive_all, seconds_left

_MAGIC = b"NBDMAGIC"
_OPTION = b"IHAVEOPT"
_REPLY = 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO = 7
_REP_ACK, _REP_INFO, _REP_ERROR = 1, 3, 1 << 31
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_READ_ONLY = 2
_REPLIES_MAX = 32
_REPLY_BYTES_MAX = 8192
# The engine asks for pages, one by one and in windows.
_LEAST_BYTES, _MOST_BYTES = 4096, 128 << 10
_REFUSED = {
    1: ("does not know how to open an export by NBD_OPT_GO", "use a newer NBD server"),
    2: ("refuses the export", "see what the server allows"),
    5: ("wants TLS", "say --tls=require --tls-certificates FOLDER"),
    6: ("has no such export", "see what the server exports, as with: nbdinfo --list"),
    7: ("is shutting down", "name another server"),
}


class Export(NamedTuple):
    """What can be used."""

    size_bytes: int
    flags: int


def ask_export(sock: socket.socket, name: bytes, what: str, deadline: float) -> Export:
    """Open the export on a new connection; `what` names it in errors."""
    try:
        return _ask(sock, name, what, deadline)
    except (struct.error, ValueError) as error:
        raise FarmemError(f"{what}: {error}", "see that it is an NBD server") from error


def _ask(sock: socket.socket, name: bytes, what: str, deadline: float) -> Export:
    hello = receive_all(sock, 18, deadline)
    if hello[:8] != _MAGIC or hello[8:16] != _OPTION:
        raise ValueError("what answers there does not speak the NBD protocol")
    [flags] = struct.unpack("!H", hello[16:])
    if not flags & _FIXED_NEWSTYLE:
        raise ValueError("the NBD server is too old (no fixed newstyle handshake)")
    words = struct.pack("!I", len(name)) + name + struct.pack("!HH", 1, _INFO_BLOCK_SIZE)
    question = struct.pack("!I", _FIXED_NEWSTYLE | (flags & _NO_ZEROES))
    sock.settimeout(seconds_left(deadline))
    sock.sendall(question + _OPTION + struct.pack("!II", _OPT_GO, len(words)) + words)
    export: Export | None = None
    for _ in range(_REPLIES_MAX):
        magic, option, kind, size = struct.unpack("!QIII", receive_all(sock, 20, deadline))
        if magic != _REPLY or option != _OPT_GO or size > _REPLY_BYTES_MAX:
            break
        data = receive_all(sock, size, deadline)
        if kind & _REP_ERROR:
            said, hint = _REFUSED.get(kind & ~_REP_ERROR, ("refuses the export", ""))
            raise FarmemError(f"{what}: the server {said}", hint or "see what the server says")
        if kind == _REP_ACK and export is not None:
            return _usable(export, what)
        if kind != _REP_INFO:
            break
        export = _learn(data, what) or export
    raise ValueError("the server's answers are not those of the NBD protocol")


def _learn(data: bytes, what: str) -> Export | None:
    [kind] = struct.unpack_from("!H", data)
    if kind == _INFO_EXPORT:
        return Export(*struct.unpack("!QH", data[2:]))
    if kind == _INFO_BLOCK_SIZE:
        least, _, most = struct.unpack("!III", data[2:])
        if least > _LEAST_BYTES or most < _MOST_BYTES:
            raise FarmemError(
                f"{what}: the server takes requests of {least} to {most} bytes",
                f"it must take {_LEAST_BYTES} to {_MOST_BYTES}",
            )
    return None


def _usable(export: Export, what: str) -> Export:
    if export.flags & _READ_ONLY:
        raise FarmemError(f"{what}: the export is read-only", "a pool is written to")
    return export


def say_goodbye(sock: socket.socket, deadline: float | None = None) -> None:
    """End the connection as the protocol wants it; with a deadline, wait until it has ended.

    An agent for TLS takes a client that just hangs up for one that wants nothing sent any more.
    """
    with contextlib.suppress(OSError):  # it has gone first
        sock.sendall(struct.pack("!IHHQQI", 0x25609513, 0, 2, 0, 0, 0))
        if deadline is not None:
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(seconds_left(deadline))
            sock.recv(1)
    sock.close()
