"""The job's socket as the supervisor speaks it: over SOCK_SEQPACKET, engines say struct
fm_wire, a person's command asks a question in JSON.

Anybody on the host can connect to an abstract socket: nothing is believed before the
token, and pid and uid are the kernel's word, never the message's.  Nothing here waits for
the other side.
"""

import contextlib
import fcntl
import hmac
import os
import socket
import struct
from typing import Any, NamedTuple

from farmem import _native
from farmem.job import memfd

ffi, lib = _native.ffi, _native.lib

FDS_MAX = 8
QUESTION_BYTES_MAX = 1024
# What comes with the descriptor that an answer lies in.
ANSWER = b"farmem answer 1"
ANSWER_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_SO_PEERPIDFD = 77  # Linux 6.5; not in Python's socket yet
_CREDENTIALS = struct.Struct("iII")
_WIRE_BYTES: int = ffi.sizeof("struct fm_wire")


class Hello(NamedTuple):
    """An engine asks for a slot."""

    is_valid: bool
    slot: int


class Question(NamedTuple):
    """A person's command asks; whether it may is for its uid to say."""

    text: bytes


class Peer(NamedTuple):
    """Who is at the other end, by the kernel's word."""

    pid: int
    uid: int
    pidfd: int


class Connection:
    """One connection, of an engine most often."""

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self.sock = sock
        self.pid, self.uid, self._pidfd = peer
        self.is_known = False

    def take_pidfd(self) -> int:
        """The pidfd of the peer, which is the caller's from now on."""
        pidfd, self._pidfd = self._pidfd, -1
        return pidfd if pidfd >= 0 else os.pidfd_open(self.pid)

    def close(self) -> None:
        """Close the socket, and the pidfd unless somebody took it."""
        self.sock.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)


def credentials_of(sock: socket.socket) -> tuple[int, int]:
    """The pid (0: of a pid namespace that we can't see) and the uid at the other end."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid


def peer_of(sock: socket.socket) -> Peer | None:
    """Who is at the other end; None when it has gone, or can't be seen."""
    pid, uid = credentials_of(sock)
    if pid <= 0:
        return None
    try:
        return Peer(pid, uid, sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
    except OSError:
        pass
    try:
        return Peer(pid, uid, os.pidfd_open(pid))
    except OSError:
        return None


class Wire:
    """Reads and writes messages."""

    def __init__(self, token: bytes) -> None:
        self._token = token

    def receive(self, connection: Connection) -> Hello | Question | list[int] | None:
        """A hello, a question, or userfaultfds to be held; None: the connection is
        to be closed.  BlockingIOError: nothing has come."""
        ancillary_bytes = socket.CMSG_SPACE(FDS_MAX * 4)
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            data, ancillary, got, _ = connection.sock.recvmsg(
                QUESTION_BYTES_MAX, ancillary_bytes, flags
            )
        except BlockingIOError:
            raise  # there is nothing yet
        except OSError:
            return None
        fds = _descriptors(ancillary)
        is_whole = not got & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
        if is_whole and data[:1] == b"{" and not fds:
            return Question(data)
        if is_whole and len(data) == _WIRE_BYTES:
            wire = ffi.from_buffer("struct fm_wire *", data)
            if wire.magic == lib.FM_CONTROL_MAGIC:
                if wire.kind == lib.FM_WIRE_HELLO and not fds:
                    return Hello(self._is_ours(wire), wire.slot)
                if wire.kind == lib.FM_WIRE_HOLD and fds:
                    return fds
        for fd in fds:
            os.close(fd)
        return None

    def _is_ours(self, wire: Any) -> bool:
        token = bytes(ffi.buffer(wire.token))
        return wire.version == lib.FM_CONTROL_VERSION and hmac.compare_digest(token, self._token)

    def send_welcome(self, connection: Connection, slot: int, fds: list[int]) -> bool:
        """Tell the slot, and hand over the job's memory."""
        return _send(connection, lib.FM_WIRE_WELCOME, slot, fds)

    def send_refused(self, connection: Connection) -> None:
        """Not of this job, of another version, or no room."""
        _send(connection, lib.FM_WIRE_REFUSED, lib.FM_SLOT_ANY, [])

    def send_answer(self, connection: Connection, text: bytes) -> None:
        """The answer to a question.

        In a descriptor of its own, so that its length is no matter: nobody has to take it
        from us piece by piece.  Sealed, so that the other side can rely on it.
        """
        with contextlib.suppress(OSError):  # it has gone, or we are out of descriptors
            fd = memfd("farmem-answer")
            try:
                left = memoryview(text)
                while left:
                    left = left[os.write(fd, left) :]
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ANSWER_SEALS)
                flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                socket.send_fds(connection.sock, [ANSWER], [fd], flags)
            finally:
                os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) // 4
            fds += struct.unpack(f"{whole}i", data[: whole * 4])
    return fds


def _send(connection: Connection, kind: int, slot: int, fds: list[int]) -> bool:
    wire = ffi.new("struct fm_wire *")
    wire.magic = lib.FM_CONTROL_MAGIC
    wire.version = lib.FM_CONTROL_VERSION
    wire.kind = kind
    wire.pid = connection.pid
    wire.slot = slot
    message = bytes(ffi.buffer(wire))
    with contextlib.suppress(OSError):
        # An engine that does not read its answers is cut off: MSG_DONTWAIT.
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        ancillary = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))
        sent = connection.sock.sendmsg([message], [ancillary] if fds else [], flags)
        return sent == _WIRE_BYTES
    return False
