"""Where the server listens: addresses as people write them, and sockets that systemd has made.

Each control socket has a data socket of its own kind beside it: for TCP another port of the
same address, for a Unix socket PATH.nbd.  Off-host addresses need TLS, or --tls=off said.
"""

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from typing import Any, NamedTuple

from farmem.errors import FarmemError

BACKLOG = 128
DATA_SUFFIX = ".nbd"
DATA_NAME = "data"
_ACTIVATION_FIRST = 3
_UNIX_PATH_BYTES_MAX = 107
_PORT_ATTEMPTS = 20
_EXAMPLES = "write it as 127.0.0.1:7717, [::1]:7717, or unix:/run/farmem/pool.sock"
# A peer that has gone without a word is noticed within about this time, and its connection ended.
_KEEPALIVE = (
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 90_000),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
)


Place = tuple[int, tuple[Any, ...]]  # a family, and an address of it


class Listen(NamedTuple):
    """An address that was asked for: a path, or a host and a port."""

    text: str
    host: str = ""
    port: int = 0
    path: str = ""


class Listener:
    """A control socket, and where its clients find the data."""

    def __init__(self, control: socket.socket, data: socket.socket) -> None:
        self.control = control
        self.data = data
        self.is_unix = control.family == socket.AF_UNIX

    @property
    def data_port(self) -> int | None:
        """The TCP port of the data."""
        return None if self.is_unix else int(self.data.getsockname()[1])

    @property
    def data_path(self) -> str | None:
        """The Unix socket of the data."""
        return str(self.data.getsockname()) if self.is_unix else None

    def url(self) -> str:
        """What a client's --pool says for it."""
        return url_of(self.control)


def url_of(sock: socket.socket) -> str:
    """A listening socket as a pool's URL."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix://{name}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"tcp://{host}:{name[1]}"


def parse_listen(text: str) -> Listen:
    """HOST:PORT or unix:PATH."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.startswith(("/", ".")):
            raise FarmemError(f"--listen {text!r} names no path", _EXAMPLES)
        path = os.path.abspath(path)
        if len(os.fsencode(path + DATA_SUFFIX)) > _UNIX_PATH_BYTES_MAX:
            most = _UNIX_PATH_BYTES_MAX - len(DATA_SUFFIX)
            raise FarmemError(
                f"--listen {text!r}: a Unix socket's path has at most {most} bytes here",
                "choose a shorter path, as unix:/run/farmem/pool.sock",
            )
        return Listen(text, path=path)
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise FarmemError(f"--listen {text!r}: an IPv6 address stands in brackets", _EXAMPLES)
    if not colon or not host or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise FarmemError(f"--listen {text!r} is not an address", _EXAMPLES)
    return Listen(text, host, int(port))


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this host can reach a socket."""
    if sock.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


class Sockets:
    """Everything that the server listens on."""

    def __init__(self, data_port: int = 0) -> None:
        self.listeners: list[Listener] = []
        self._data_port = data_port
        self._made: list[tuple[str, os.stat_result]] = []

    def open(self, listens: tuple[Listen, ...], tls: str) -> None:
        """Bind what was asked for, and take what systemd hands over."""
        try:
            given, data = _inherited()
            for sock in given:
                self.listeners.append(Listener(sock, self._data_beside(sock, data)))
            for listen in listens:
                if listen.path:
                    self._open_unix(listen)
                else:
                    self._open_tcp(listen)
            if not self.listeners:
                raise FarmemError("there is nowhere to listen", f"give --listen: {_EXAMPLES}")
            self._check_tls(tls)
        except BaseException:
            self.close()
            raise

    def _check_tls(self, tls: str) -> None:
        for listener in self.listeners:
            for sock in (listener.control, listener.data):
                if not is_loopback(sock) and not tls:
                    raise FarmemError(
                        f"{url_of(sock)} can be reached from other hosts, and it is not said how",
                        "say --tls=require --tls-certificates FOLDER; or --tls=off, if you trust "
                        "everybody on that network; or listen on 127.0.0.1:7717 or unix:PATH",
                    )

    def _data_beside(self, control: socket.socket, data: list[socket.socket]) -> socket.socket:
        """A data socket that systemd handed over, or a new one."""
        for sock in data:
            if (sock.family == socket.AF_UNIX) == (control.family == socket.AF_UNIX):
                return sock
        name = control.getsockname()
        if control.family == socket.AF_UNIX:
            return self._unix_socket(Listen("systemd's", path=f"{name}{DATA_SUFFIX}"), control)
        return self._tcp_socket(control.family, (name[0], self._data_port, *name[2:]), "data port")

    def _open_tcp(self, listen: Listen) -> None:
        """Every address that the host has, on the same ports."""
        try:
            flags = socket.AI_PASSIVE
            found = socket.getaddrinfo(
                listen.host, listen.port, type=socket.SOCK_STREAM, flags=flags
            )
        except (OSError, UnicodeError) as error:
            raise FarmemError(f"--listen {listen.text!r}: {error}", _EXAMPLES) from error
        places: list[Place] = [(family, tuple(address)) for family, _, _, _, address in found]
        control = self._same_port(places, listen.port, f"--listen {listen.text!r}")
        data = self._same_port(places, self._data_port, f"--data-port {self._data_port}")
        pairs = zip(control, data, strict=True)
        self.listeners += [Listener(one, other) for one, other in pairs]

    def _same_port(self, places: list[Place], port: int, what: str) -> list[socket.socket]:
        """A socket for each address, on one port; 0: one that the kernel chooses."""
        for attempt in range(_PORT_ATTEMPTS):
            made: list[socket.socket] = []
            for family, address in places:
                wanted = made[0].getsockname()[1] if made else port
                try:
                    place = (address[0], wanted, *address[2:])
                    made.append(self._tcp_socket(family, place, what))
                except FarmemError:
                    for sock in made:
                        sock.close()
                    if port or not made or attempt == _PORT_ATTEMPTS - 1:
                        raise
                    break
            else:
                return made
        raise AssertionError("not reached")

    @staticmethod
    def _tcp_socket(family: int, address: tuple[Any, ...], what: str) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for level, name, value in _KEEPALIVE:
                sock.setsockopt(level, name, value)
            sock.bind(address)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise FarmemError(
                f"{what}: can't listen on {address[0]} port {address[1]}: {error.strerror}",
                "choose an address of this host and a port that is free",
            ) from error
        return sock

    def _open_unix(self, listen: Listen) -> None:
        control = self._unix_socket(listen)
        data = self._unix_socket(listen._replace(path=f"{listen.path}{DATA_SUFFIX}"))
        self.listeners.append(Listener(control, data))

    def _unix_socket(self, listen: Listen, model: socket.socket | None = None) -> socket.socket:
        """A Unix socket; who may connect is the umask's word, or that of a model's mode."""
        _remove_stale(listen)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(listen.path)
            self._made.append((listen.path, os.stat(listen.path)))
            if model is not None:
                there = os.stat(model.getsockname())
                os.chown(listen.path, -1, there.st_gid)
                os.chmod(listen.path, stat.S_IMODE(there.st_mode))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise FarmemError(
                f"can't listen on {listen.path}: {error.strerror}",
                "name a path in a folder that you may write to, as unix:/tmp/pool.sock",
            ) from error
        return sock

    def close(self) -> None:
        """Listen no more; what was put in the file system goes."""
        for listener in self.listeners:
            listener.control.close()
            listener.data.close()
        for path, made in self._made:
            with contextlib.suppress(OSError):
                there = os.stat(path)
                if (there.st_dev, there.st_ino) == (made.st_dev, made.st_ino):
                    os.unlink(path)
        self._made.clear()


def _remove_stale(listen: Listen) -> None:
    """What a server that was killed has left behind; never what somebody listens on."""
    try:
        mode = os.lstat(listen.path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise FarmemError(f"{listen.path} is there, and is no socket", "choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.settimeout(1)
            probe.connect(listen.path)
        except ConnectionRefusedError:
            os.unlink(listen.path)
            return
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
    raise FarmemError(f"somebody listens on {listen.path} already", "choose another path")


def is_activated() -> bool:
    """Whether systemd has handed sockets to this very process."""
    count = os.environ.get("LISTEN_FDS", "")
    return os.environ.get("LISTEN_PID") == str(os.getpid()) and count.isdigit() and count != "0"


def _inherited() -> tuple[list[socket.socket], list[socket.socket]]:
    """The sockets of sd_listen_fds(3): those that clients ask, and those for the data."""
    control: list[socket.socket] = []
    data: list[socket.socket] = []
    if not is_activated():
        return control, data
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    del os.environ["LISTEN_PID"]
    for number in range(int(os.environ.pop("LISTEN_FDS"))):
        sock = _inherited_socket(_ACTIVATION_FIRST + number)
        is_data = number < len(names) and names[number] == DATA_NAME
        if sock.family == socket.AF_UNIX and sock.getsockname().endswith(DATA_SUFFIX):
            is_data = True
        (data if is_data else control).append(sock)
    return control, data


def _inherited_socket(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        sock.set_inheritable(False)
        is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        what = f"descriptor {fd}, which systemd handed over, is no socket: {error.strerror}"
        raise FarmemError(what, "see ListenStream= in the .socket unit") from error
    if sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) or not is_listening:
        raise FarmemError(
            f"descriptor {fd}, which systemd handed over, is no socket that listens",
            "see ListenStream= in the .socket unit",
        )
    return sock
