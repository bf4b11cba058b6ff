"""An NBD server in Python that follows the protocol, except in what a test tells it to do.

Its memory is a bytearray; a thread serves each connection.  `wrong` is done instead of every
`every`-th reply to a read, for as long as it is set.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator

MIB = 1 << 20
FLAGS = 1 | 1 << 5 | 1 << 8  # has flags, TRIM, several connections
WRONGS = ("bad-magic", "wrong-cookie", "short-data", "close", "structured", "rubbish")


class FakeNbd:
    """`url` is where it listens."""

    def __init__(self, size_mib: int = 256) -> None:
        self.memory = bytearray(size_mib * MIB)
        self.wrong = ""
        self.every = 100
        self.reads = 0
        self.done = 0  # wrongs
        self.trimmed_bytes = 0
        self.refusal = 0  # of NBD_OPT_GO
        self.flags = FLAGS
        self._random = random.Random(1)
        self._corrupted: set[int] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.url = f"nbd://127.0.0.1:{self._listener.getsockname()[1]}/an%20export"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def options(self) -> tuple[str, ...]:
        """Of `farmem run`."""
        return ("--pool", self.url)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """End every connection that there is now."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._sockets.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), sock, sock.makefile("rb", 0) as file:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            held: list[bytes] = []
            if self._shake_hands(sock, file):
                while self._answer(sock, file, held):
                    pass

    def _shake_hands(self, sock: socket.socket, file: object) -> bool:
        sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack("!H", 3))
        _, _, option, size = struct.unpack("!I8sII", take(file, 20))
        assert option == 7
        words = take(file, size)
        [length] = struct.unpack_from("!I", words)
        assert words[4 : 4 + length] == b"an export"

        def reply(kind: int, data: bytes) -> bytes:
            return struct.pack("!QIII", 0x3E889045565A9, option, kind, len(data)) + data

        if self.refusal:
            sock.sendall(reply(self.refusal, b"no"))
            return False
        export = struct.pack("!HQH", 0, len(self.memory), self.flags)
        sock.sendall(reply(3, export) + reply(1, b""))
        return True

    def _answer(self, sock: socket.socket, file: object, held: list[bytes]) -> bool:
        magic, _, kind, cookie, at, size = struct.unpack("!IHHQQI", take(file, 28))
        assert magic == 0x25609513 and at + size <= len(self.memory)
        data = b""
        if kind == 2:
            return False
        if kind == 1:
            self.memory[at : at + size] = take(file, size)
        elif kind == 4:
            self.memory[at : at + size] = bytes(size)
            self.trimmed_bytes += size
        elif kind == 0:
            data = bytes(self.memory[at : at + size])
        reply = struct.pack("!IIQ", 0x67446698, 0, cookie) + data
        if kind == 0:
            self.reads += 1
            if self.wrong and self.reads % self.every == 0:
                self.done += 1
                return self._wrong(sock, reply, (cookie, at), data, held)
        sock.sendall(reply + b"".join(held))
        held.clear()
        return True

    def _wrong(
        self, sock: socket.socket, reply: bytes, of: tuple[int, int], data: bytes, held: list[bytes]
    ) -> bool:
        """False: the connection ends."""
        cookie, at = of
        if self.wrong == "close":
            return False
        if self.wrong == "short-data":
            sock.sendall(reply[: len(reply) // 2])
            return False
        if self.wrong == "reorder":
            return self._later(sock, reply, held)
        head = {
            "bad-magic": struct.pack("!IIQ", 0x12345678, 0, cookie),
            "wrong-cookie": struct.pack("!IIQ", 0x67446698, 0, cookie ^ 1 << 50),
            "structured": struct.pack("!IHHQI", 0x668E33EF, 1, 1, cookie, len(data) + 8),
        }
        if self.wrong == "rubbish":
            reply = self._random.randbytes(len(reply))
        elif self.wrong == "corrupt":
            reply = self._corrupt(reply, at)
        else:
            reply = head[self.wrong] + data
        sock.sendall(reply)
        return True

    def _later(self, sock: socket.socket, reply: bytes, held: list[bytes]) -> bool:
        """Behind the next reply, if that comes soon."""
        sock.settimeout(0.001)
        try:
            more = sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            more = b""
        sock.settimeout(None)
        held.append(reply)
        if not more:
            sock.sendall(b"".join(held))
            held.clear()
        return True

    def _corrupt(self, reply: bytes, at: int) -> bytes:
        """A bit of it is another; but of a page not twice: it is asked for again, once."""
        where = self._random.randrange(len(reply) - 16)
        page = (at + where) // 4096
        if self.every > 1 and page in self._corrupted:
            self._corrupted.discard(page)
            self.done -= 1
            return reply
        self._corrupted.add(page)
        changed = bytearray(reply)
        changed[16 + where] ^= 1 << self._random.randrange(8)
        return bytes(changed)


def take(file: object, size: int) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < size:
        chunk: bytes = file.read(size - len(data))  # type: ignore[attr-defined]
        if not chunk:
            raise EOFError
        data += chunk
    return data


@contextlib.contextmanager
def fake_nbd(size_mib: int = 256) -> Iterator[FakeNbd]:
    server = FakeNbd(size_mib)
    try:
        yield server
    finally:
        server.close()
