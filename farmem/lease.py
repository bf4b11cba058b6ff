"""A lease of memory on a `farmem serve`: got before the job, renewed while it runs, given back.

The server's control channel is HTTP with JSON, with TLS where that is wanted.  Every call makes a
connection of its own and has one deadline for all of it.  The token is a secret: it is in no
message, no argument and no environment.
"""

import contextlib
import http.client
import io
import json
import os
import pwd
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from farmem.errors import FarmemError
from farmem.running import printable
from farmem.servers import Address, Server, connect, seconds_left, why
from farmem.tls import ON, PLAIN, NoTls, Secure, Tls

ANSWER_BYTES_MAX = 1 << 20
LINE_BYTES_MAX = 1 << 20
RENEW_SECONDS = 5.0
RELEASE_SECONDS = 2.0
FREE_SECONDS = 1.0
_TEXT_MAX = 200
_RENEWALS = 3  # in the time that a lease lives
_SOON_SECONDS = 2.0
_FREE_AGAIN_SECONDS = 0.1
_START_HINT = "see that `farmem serve` runs there and listens where you asked"


class Stranger(FarmemError):
    """What answers there is something else."""


class _Bytes:
    """What http.client wants of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


class Answer(NamedTuple):
    """A status and the object that came with it."""

    status: int
    document: dict[str, Any]


class Control:
    """The control channel of one server."""

    def __init__(self, server: Server, addresses: list[Address], tls: Tls = PLAIN) -> None:
        self.server = server
        self.addresses = addresses
        self._may_be_plain = tls.mode == ON
        self._secure = Secure(server, tls.folder) if tls.is_wanted else None

    @property
    def is_tls(self) -> bool:
        """Whether it has been spoken to with TLS."""
        return self._secure is not None

    def call(
        self, method: str, path: str, deadline: float, body: Any = None, token: str = ""
    ) -> Answer:
        """Ask; OSError: it can't be reached, or broke off."""
        request = self._request(method, path, body, token)
        with self._connected(deadline) as sock:
            return self._understood(self._exchanged(sock, request, deadline))

    def follow(self, path: str, body: Any, deadline: float) -> Iterator[dict[str, Any]]:
        """What a long answer says, an object in each line, until its end; OSError: it broke off,
        or the deadline has come."""
        with self._connected(deadline) as sock:
            sock.sendall(self._request("POST", path, body, ""))
            try:
                response = http.client.HTTPResponse(sock)
                response.begin()
                while line := response.readline(LINE_BYTES_MAX):
                    sock.settimeout(seconds_left(deadline))
                    document = json.loads(line)
                    yield document if isinstance(document, dict) else {}
            except (http.client.HTTPException, ValueError, RecursionError) as error:
                raise ConnectionError("its answer is not understood") from error

    def _request(self, method: str, path: str, body: Any, token: str) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        host = "localhost" if self.server.path else self.server.name
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
        lines += [f"Authorization: Bearer {token}"] if token else []
        if body is not None:
            lines += ["Content-Type: application/json"]
        if body is not None or method == "POST":
            lines += [f"Content-Length: {len(data)}"]
        return "\r\n".join([*lines, "", ""]).encode() + data

    def _connected(self, deadline: float) -> socket.socket:
        sock, address = connect(self.addresses, deadline)
        self.addresses = [address]
        if self._secure is None:
            return sock
        try:
            return self._secure.begin(sock, deadline)
        except NoTls:
            if not self._may_be_plain:
                raise
        self._secure = None
        return self._connected(deadline)

    def _exchanged(self, sock: socket.socket, request: bytes, deadline: float) -> bytes:
        if self._secure is None:
            return _exchange(sock, request, deadline)
        import ssl

        self._may_be_plain = False  # what has spoken TLS once does so always
        try:
            data = _exchange(sock, request, deadline)
        except (ssl.SSLEOFError, ConnectionError):
            data = b""  # the handshake went well: it can't be that there is no TLS
        except ssl.SSLError as error:
            raise self._secure.error_of(error) from error
        if not data:
            raise self._secure.unanswered()
        return data

    def _understood(self, data: bytes) -> Answer:
        response = http.client.HTTPResponse(_Bytes(data))  # type: ignore[arg-type]
        try:
            response.begin()
            text = response.read()
            document = json.loads(text) if text else {}
        except (http.client.HTTPException, ValueError, RecursionError, OSError) as error:
            raise Stranger(
                f"what answers at {self.server.name} is no farmem server", _START_HINT
            ) from error
        return Answer(response.status, document if isinstance(document, dict) else {})

    def asked(self, method: str, path: str, deadline: float, body: Any = None) -> dict[str, Any]:
        """The answer to something that must be granted."""
        try:
            answer = self.call(method, path, deadline, body)
        except OSError as error:
            raise unreachable(self.server, error) from error
        if answer.status // 100 != 2:
            raise FarmemError(f"{self.server.name}: {_refusal(answer)}", _hint(answer))
        return answer.document


def unreachable(server: Server, error: OSError, what: str = "") -> FarmemError:
    """A server that does not answer, named."""
    hint = _START_HINT if server.leases else "see that an NBD server listens there"
    what = what or f"pool {server.url!r}"
    return FarmemError(f"{what}: {no_answer(server, error)}", hint)


def no_answer(server: Server, error: OSError) -> str:
    """That it does not answer, and why."""
    return f"{server.name} can't be reached: {why(error)}"


def _exchange(sock: socket.socket, request: bytes, deadline: float) -> bytes:
    sock.settimeout(seconds_left(deadline))
    sock.sendall(request)
    data = b""
    while len(data) <= ANSWER_BYTES_MAX:
        sock.settimeout(seconds_left(deadline))
        chunk = sock.recv(1 << 16)
        if not chunk:
            return data
        data += chunk
    raise ConnectionError("its answer is too long")


def _text(answer: Answer, key: str) -> str:
    value = answer.document.get(key)
    return printable(value[:_TEXT_MAX]) if isinstance(value, str) else ""


def _refusal(answer: Answer) -> str:
    return _text(answer, "error") or f"the server answered with status {answer.status}"


def _hint(answer: Answer) -> str:
    return _text(answer, "hint") or "see what the server says"


def refusal_of(answer: Answer) -> tuple[str, str]:
    """Why something was refused, and what to do."""
    return _refusal(answer), _hint(answer)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


class Lease:
    """Memory that was promised, until it is released or no longer renewed."""

    def __init__(self, control: Control, document: dict[str, Any]) -> None:
        self._control = control
        self._id, self._token = _word(document, "lease"), _word(document, "token")
        self.size_bytes = _number(document, "bytes")
        self._ttl_seconds = _number(document, "ttl_ns") / 1e9
        self._epoch = document.get("epoch")
        data = document.get("nbd")
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        self.has_rdma = isinstance(document.get("rdma"), dict)
        self._ended = threading.Event()
        self._lost = False

    def call(self, method: str, path: str, deadline: float, body: Any = None) -> Answer:
        """Ask for what belongs to the lease."""
        return self._control.call(
            method, f"/v1/leases/{self._id}{path}", deadline, body, token=self._token
        )

    def keep(self, say: Callable[[str], None], lost: Callable[[], None]) -> None:
        """Renew it from now on, from a thread; what goes wrong is said once."""
        threading.Thread(target=self._work, args=(say, lost), daemon=True).start()

    def _work(self, say: Callable[[str], None], lost: Callable[[], None]) -> None:
        often = self._ttl_seconds / _RENEWALS
        # Its time has run since it was granted: a job may have been long in starting.
        wait, told, renewed = 0.0, False, time.monotonic()
        name = self._control.server.name
        while not self._ended.wait(wait):
            reason = self._renew()
            if self._ended.is_set():
                return  # it was given back meanwhile, and nothing is lost
            if self._lost:
                say(f"the lease on {name} has gone ({reason}): pages that are there are lost")
                lost()
                return
            if not reason:
                if told:
                    say(f"the lease on {name} was renewed again")
                wait, told, renewed = often, False, time.monotonic()
                continue
            if not told and time.monotonic() - renewed >= 2 * often:
                told = True
                say(f"the lease on {name} can't be renewed: {reason}")
            wait = min(_SOON_SECONDS, often)

    def _renew(self) -> str:
        """Nothing, or why it could not be done."""
        path = f"/v1/leases/{self._id}/renew"
        deadline = time.monotonic() + RENEW_SECONDS
        try:
            answer = self._control.call("POST", path, deadline, token=self._token)
        except OSError as error:
            return why(error)
        except FarmemError as error:
            return error.what
        if answer.status == 200:
            self._lost = answer.document.get("epoch", self._epoch) != self._epoch
            return "the server was started anew" if self._lost else ""
        self._lost = answer.status in (401, 403, 404)
        return _refusal(answer)

    def release(self) -> None:
        """Give it back; best effort: what is not given back ends by itself."""
        self._ended.set()
        if self._lost:
            return
        deadline = time.monotonic() + RELEASE_SECONDS
        with contextlib.suppress(OSError, FarmemError):
            self._control.call("DELETE", f"/v1/leases/{self._id}", deadline, token=self._token)


def _word(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not (value.isascii() and value.isalnum()):
        raise FarmemError(f"the server's lease has no {key}", "see that it is a farmem server")
    return value


def _number(document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    if type(value) is not int or value <= 0:
        raise FarmemError(f"the server said no {key}", "see that it is a farmem server")
    return value


def standing(control: Control, deadline: float) -> tuple[int, int]:
    """What a server may lend at once, and what of it is free; what it does not say is 0."""
    server = control.asked("GET", "/v1/server", deadline)
    sizes = (server.get("capacity_bytes"), server.get("free_bytes"))
    capacity_bytes, free_bytes = (size if type(size) is int and size > 0 else 0 for size in sizes)
    return capacity_bytes, free_bytes


def acquire(
    control: Control,
    wanted_bytes: int | None,
    most_bytes: int,
    deadline: float,
    patience_seconds: float = FREE_SECONDS,
) -> Lease:
    """A lease of so many bytes, or of what there is, up to as much as most_bytes."""
    if wanted_bytes is None:
        wanted_bytes = _what_there_is(control, most_bytes, deadline, patience_seconds)
    job = f"{socket.gethostname()} {os.getpid()}"
    request = {"bytes": wanted_bytes, "job": job}
    if not control.is_tls:  # else the tenant is who our certificate says
        request["tenant"] = _user()
    return Lease(control, control.asked("POST", "/v1/leases", deadline, request))


def _what_there_is(
    control: Control, most_bytes: int, deadline: float, patience_seconds: float
) -> int:
    """What the server has free, in whole extents.  A job that has just ended, and had it all, gives
    it back a moment after its command has gone."""
    patience = time.monotonic() + patience_seconds
    while True:
        server = control.asked("GET", "/v1/server", deadline)
        extent_bytes = _number(server, "extent_bytes")
        free_bytes = server.get("free_bytes")
        if type(free_bytes) is int and free_bytes >= extent_bytes:
            return min(free_bytes, most_bytes) // extent_bytes * extent_bytes
        if time.monotonic() > patience:
            raise FarmemError(
                f"{control.server.name} has no memory free", "name another server, or try later"
            )
        time.sleep(_FREE_AGAIN_SECONDS)
