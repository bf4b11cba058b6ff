"""Pools on other hosts: their URLs, and how a server is reached before the program starts.

`tcp://HOST:PORT` and `unix:///PATH` are where a `farmem serve` leases memory, `rdma://HOST:PORT`
where it does so for one-sided RDMA, `nbd://HOST[:PORT]/EXPORT`, `nbds://` with TLS, and
`nbd+unix:///EXPORT?socket=PATH` any NBD server's export.
Names are looked up here and nowhere else: the engine gets an address.  Everything that waits
has a deadline, which holds for all of it together.
"""

import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from farmem.errors import FarmemError
from farmem.sizes import parse_size

NBD_PORT = 10809
REACH_SECONDS = 5.0
UNIX_PATH_BYTES_MAX = 107
EXPORT_BYTES_MAX = 1024
NAME_BYTES_MAX = 127
SERVER_HINT = (
    "write it as tcp://HOST:PORT, rdma://HOST:PORT or unix:///PATH (a `farmem serve`), or as "
    "nbd://HOST:PORT/EXPORT, nbds://HOST:PORT/EXPORT (with TLS) or "
    "nbd+unix:///EXPORT?socket=PATH (an NBD server)"
)
_SILENT = "it does not answer"
_UNNAMED = "its name can't be looked up"
_PARAMETERS = {
    "tcp": {"size"},
    "rdma": {"size"},
    "unix": {"size"},
    "nbd": set(),
    "nbds": set(),
    "nbd+unix": {"socket"},
}


Found = TypeVar("Found")


class Server(NamedTuple):
    """Where a server is: a host and a port, or the path of a Unix socket."""

    url: str
    leases: bool  # it is asked for memory first
    host: str
    port: int
    path: str
    export: bytes
    size_bytes: int | None  # wanted; None: what there is
    is_tls: bool = False  # its URL says so
    by_rdma: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"


class Address(NamedTuple):
    """Where to connect: for Python's sockets, and as the kernel's struct sockaddr."""

    family: int
    where: tuple[str, int, int, int] | tuple[str, int] | str

    def packed(self) -> bytes:
        """The struct sockaddr.  An abstract name is as long as it is, and a path ends with 0."""
        family = struct.pack("=H", self.family)
        if isinstance(self.where, str):
            end = b"" if self.where.startswith("\0") else b"\0"
            return family + os.fsencode(self.where) + end
        raw = socket.inet_pton(self.family, self.where[0].partition("%")[0])
        if self.family == socket.AF_INET:
            return family + struct.pack("!H4s8x", self.where[1], raw)
        flow, scope = self.where[2:] if len(self.where) == 4 else (0, 0)
        return family + struct.pack("!HI16s", self.where[1], flow, raw) + struct.pack("=I", scope)

    def numeric(self) -> tuple[str, str]:
        """Host and port in digits, as another program wants them."""
        assert not isinstance(self.where, str)
        host, port = self.where[:2]
        scope = self.where[3] if len(self.where) == 4 else 0
        return (f"{host}%{scope}" if scope and "%" not in host else host), str(port)

    def with_port(self, port: int) -> "Address":
        """The same host's other port."""
        assert not isinstance(self.where, str)
        if len(self.where) == 4:
            return Address(self.family, (self.where[0], port, *self.where[2:]))
        return Address(self.family, (self.where[0], port))


def parse_server(url: str) -> Server:
    """The URL of a pool elsewhere.  Only looked at: nobody is asked yet."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise FarmemError(f"pool {url!r} is not understood: {error}", SERVER_HINT) from error
    scheme = parts.scheme
    options = _options(url, parts)
    if parts.username is not None or parts.fragment or not url.startswith(f"{scheme}://"):
        raise FarmemError(f"pool {url!r} is not understood", SERVER_HINT)
    size = options.get("size")
    size_bytes = None if size is None else parse_size(size, "pool size")
    path, export = "", b""
    if scheme in ("tcp", "rdma", "nbd", "nbds"):
        port = _port(url, scheme, host, port)
        if scheme not in ("tcp", "rdma"):
            export = _export(url, parts.path)
        elif parts.path not in ("", "/"):
            raise FarmemError(f"pool {url!r}: nothing belongs behind the port", SERVER_HINT)
    else:
        if host or port is not None:
            raise FarmemError(
                f"pool {url!r} needs three slashes: no host belongs there", SERVER_HINT
            )
        path = unquote(parts.path) if scheme == "unix" else options.get("socket", "")
        export = b"" if scheme == "unix" else _export(url, parts.path)
        path = _socket_path(url, path)
    leases, is_tls = scheme in ("tcp", "rdma", "unix"), scheme == "nbds"
    is_rdma = scheme == "rdma"
    return Server(url, leases, host, port or 0, path, export, size_bytes, is_tls, is_rdma)


def _options(url: str, parts: SplitResult) -> dict[str, str]:
    known = _PARAMETERS[parts.scheme]
    options: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in known:
            have = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise FarmemError(f"pool {url!r} has no parameter {key!r}: {have}", SERVER_HINT)
        if key in options:
            raise FarmemError(f"pool {url!r} has {key} twice", SERVER_HINT)
        options[key] = value
    return options


def _port(url: str, scheme: str, host: str, port: int | None) -> int:
    if not host:
        raise FarmemError(f"pool {url!r} names no host", SERVER_HINT)
    if port == 0 or (port is None and scheme in ("tcp", "rdma")):
        raise FarmemError(
            f"pool {url!r} names no port",
            f"name the one that the server listens on: {scheme}://{host}:PORT",
        )
    return NBD_PORT if port is None else port


def _export(url: str, path: str) -> bytes:
    export = os.fsencode(unquote(path.removeprefix("/"), errors="surrogateescape"))
    if len(export) > EXPORT_BYTES_MAX:
        raise FarmemError(
            f"the export's name has {len(export)} bytes", f"{EXPORT_BYTES_MAX} are the most"
        )
    return export


def _socket_path(url: str, path: str) -> str:
    if not path or path == "/":
        raise FarmemError(f"pool {url!r} names no socket", SERVER_HINT)
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX or "\0" in path:
        raise FarmemError(
            f"pool {url!r}: a socket's path has at most {UNIX_PATH_BYTES_MAX} bytes",
            "put the socket into a folder with a shorter path",
        )
    return path


# ---- reaching it


def seconds_left(deadline: float) -> float:
    """Until a deadline; TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(_SILENT)
    return left


def is_loopback(address: Address) -> bool:
    """Whether only this host is on the way."""
    if isinstance(address.where, str):
        return True
    found = ipaddress.ip_address(address.where[0].partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def addresses_of(server: Server, deadline: float) -> list[Address]:
    """Looked up in a thread: the resolver knows no deadline of ours."""
    if server.path:
        return [Address(socket.AF_UNIX, server.path)]
    found: list[Address] = []
    failure: list[OSError] = []

    def look_up() -> None:
        try:
            for family, _, _, _, where in socket.getaddrinfo(
                server.host, server.port, type=socket.SOCK_STREAM
            ):
                found.append(Address(family, where))  # type: ignore[arg-type]
        except (OSError, UnicodeError) as error:
            failure.append(error if isinstance(error, OSError) else OSError(str(error)))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(seconds_left(deadline))
    if failure:
        raise failure[0]
    if thread.is_alive() or not found:
        raise TimeoutError(_UNNAMED)
    return found


def connect(addresses: list[Address], deadline: float) -> tuple[socket.socket, Address]:
    """The first that takes a connection."""
    failure: OSError = TimeoutError(_SILENT)
    for number, address in enumerate(addresses):
        left = seconds_left(deadline) / (len(addresses) - number)
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        sock.settimeout(left)
        try:
            sock.connect(address.where)
            return sock, address
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def reachable(addresses: list[Address], deadline: float) -> Address:
    """The first that takes a connection; where there is but one it is not tried."""
    if len(addresses) == 1:
        return addresses[0]
    sock, address = connect(addresses, deadline)
    sock.close()
    return address


def receive_all(sock: socket.socket, size_bytes: int, deadline: float) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < size_bytes:
        sock.settimeout(seconds_left(deadline))
        chunk = sock.recv(min(size_bytes - len(data), 1 << 16))
        if not chunk:
            raise ConnectionError("it closed the connection")
        data += chunk
    return data


def at_once(calls: Sequence[Callable[[], Found]]) -> list[Found]:
    """What each of them returns; they run at the same time, and none waits for another."""
    found: dict[int, Found] = {}

    def run(number: int) -> None:
        found[number] = calls[number]()

    others = range(1, len(calls))
    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in others]
    for thread in threads:
        thread.start()
    if calls:
        run(0)
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(calls))]


def why(error: OSError) -> str:
    """An error of the kernel's or the resolver's in a few words."""
    if isinstance(error, TimeoutError):
        return _UNNAMED if _UNNAMED in error.args else _SILENT
    return error.strerror or str(error) or type(error).__name__
