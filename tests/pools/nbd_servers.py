"""NBD servers that nobody here wrote, for the tests: nbdkit's memory plugin and qemu-nbd.

Each is a process of its own, on loopback (a port of the kernel's choice) or on a Unix socket, that
can be stopped, killed and started anew in the same place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LIMIT_S = 30
MIB = 1 << 20


def until(holds: Callable[[], object], what: str) -> None:
    """Wait for a state; a hang is a failure that says what did not come."""
    end = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end, f"{what}: did not come"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class NbdServer:
    """A server that can be reached when start() has returned."""

    def __init__(self, folder: Path, over: str, size_mib: int) -> None:
        self.folder = folder
        self.size_mib = size_mib
        self.socket = folder / "nbd.sock" if over == "unix" else None
        self.port = 0 if self.socket else free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        if self.socket:
            return f"nbd+unix:///?socket={self.socket}"
        return f"nbd://127.0.0.1:{self.port}/"

    @property
    def options(self) -> tuple[str, ...]:
        """Of `farmem run`."""
        return ("--pool", self.url)

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        if self.socket:
            self.socket.unlink(missing_ok=True)
        command = self.command()
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed (tools/setup.sh test)")
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, f"{command[0]} on {self.url}")

    def _answers(self) -> bool:
        assert self.process is not None
        log = (self.folder / "server.log").read_text(errors="replace")
        assert self.process.poll() is None, f"the server has ended: {log}"
        family = socket.AF_UNIX if self.socket else socket.AF_INET
        with socket.socket(family) as sock:
            sock.settimeout(LIMIT_S)
            where = str(self.socket) if self.socket else ("127.0.0.1", self.port)
            return sock.connect_ex(where) == 0 and sock.recv(8) == b"NBDMAGIC"

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """At once, as by a power cut."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(LIMIT_S)
            self.process = None


class Nbdkit(NbdServer):
    """nbdkit's memory plugin.  A thread for each connection: with more, nbdkit 1.32 can be brought
    down by any client that is killed (raw_send_socket: assertion `sock >= 0' failed)."""

    def command(self) -> list[str]:
        where = (
            ["-U", str(self.socket)] if self.socket else ["-i", "127.0.0.1", "-p", str(self.port)]
        )
        always = ["nbdkit", "-f", "-t", "1", *where]
        return [*always, *self.before(), "memory", f"{self.size_mib}M", *self.behind()]

    def before(self) -> list[str]:
        return []

    def behind(self) -> list[str]:
        return []


class ReadOnlyNbdkit(Nbdkit):
    def before(self) -> list[str]:
        return ["--readonly"]


class FullNbdkit(Nbdkit):
    """Refuses to store, while the file `full` exists."""

    def before(self) -> list[str]:
        return ["--filter=error"]

    def behind(self) -> list[str]:
        file = f"error-pwrite-file={self.folder / 'full'}"
        return ["error-pwrite=ENOSPC", "error-pwrite-rate=100%", file]


class QemuNbd(NbdServer):
    """qemu-nbd on a sparse file, which outlives it."""

    @property
    def image(self) -> Path:
        return self.folder / "image"

    def command(self) -> list[str]:
        if not self.image.exists():
            self.image.touch()
            os.truncate(self.image, self.size_mib * MIB)
        where = (
            ["-k", str(self.socket)] if self.socket else ["-b", "127.0.0.1", "-p", str(self.port)]
        )
        share = ["--shared=0", "--persistent", "--discard=unmap", "--format=raw"]
        return ["qemu-nbd", *share, *where, str(self.image)]


KINDS: dict[str, type[NbdServer]] = {
    "nbdkit": Nbdkit,
    "qemu-nbd": QemuNbd,
    "read-only": ReadOnlyNbdkit,
    "full": FullNbdkit,
}


@contextlib.contextmanager
def nbd_server(kind: str = "nbdkit", over: str = "tcp", size_mib: int = 512) -> Iterator[NbdServer]:
    """A server, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="farmem-nbd-") as name:
        server = KINDS[kind](Path(name), over, size_mib)
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(AssertionError, ProcessLookupError):
                server.signal(signal.SIGCONT)
            server.kill()
