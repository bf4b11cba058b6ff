"""What the tests of `farmem run` with TLS share: servers that want it, and a wire that listens."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.pools.nbd_servers import LIMIT_S, Nbdkit


def tls_words(folder: Path, mode: str = "require") -> tuple[str, ...]:
    """Of `farmem run` and of `farmem serve`."""
    return ("--tls", mode, "--tls-certificates", str(folder))


class TlsNbdkit(Nbdkit):
    """nbdkit's memory plugin with TLS, as its own options say it."""

    def __init__(self, folder: Path, certificates: Path, mode: str, verifies: bool) -> None:
        super().__init__(folder, "tcp", 512)
        self._words = [f"--tls={mode}", f"--tls-certificates={certificates}"]
        self._words += ["--tls-verify-peer"] if verifies else []

    @property
    def url(self) -> str:
        return f"nbds://127.0.0.1:{self.port}/"

    def before(self) -> list[str]:
        return self._words


@contextlib.contextmanager
def tls_nbdkit(
    folder: Path, certificates: Path, mode: str = "require", *, verifies: bool = True
) -> Iterator[TlsNbdkit]:
    server = TlsNbdkit(folder, certificates, mode, verifies)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Wire:
    """A port that leads to another one, and all that has gone through it."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._seen: list[bytes] = []
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    def _begin(self, run: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=run, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._begin(self._join, client)

    def _join(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._to)) as server:
            back = threading.Thread(target=self._pass_on, args=(server, client), daemon=True)
            back.start()
            self._pass_on(client, server)
            back.join()

    def _pass_on(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._seen.append(data)
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)

    def bytes_seen(self) -> bytes:
        """In pieces as they came; of two directions, so not all is in one piece."""
        return b"".join(self._seen)

    def close(self) -> None:
        """When both sides have ended their connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(LIMIT_S)
        self._listener.close()
