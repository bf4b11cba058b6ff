"""A pool `rdma://HOST:PORT`: a lease of a `farmem serve`, read and written by one-sided RDMA.

The verbs are spoken by an agent of the job (native/agent/rdma_*.c): no library may live in the
program's process.  It makes our half of each queue pair; here the server is asked for the other
half, over the control channel, with the lease's token.  Before the program starts a trial reads
from the server's memory, so that what is wrong is told in words.  Afterwards the supervisor
answers the agent, from the thread that hears it.

TCP is never chosen instead: who asks for `rdma:` gets RDMA or an error.
"""

import contextlib
import ipaddress
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from farmem import _native
from farmem.agent import START_SECONDS, Agent, program_path
from farmem.errors import FarmemError
from farmem.lease import Control, Lease, acquire, refusal_of, unreachable
from farmem.poolentry import Way, end_entry, fill_entry
from farmem.pools import EXTENT_BYTES, Pool, host_memory_bytes
from farmem.running import printable
from farmem.servers import REACH_SECONDS, Server, addresses_of, why
from farmem.tls import PLAIN, Tls

lib = _native.lib

PROGRAM = "farmem-rdma"
LIBRARY = "libibverbs.so.1"
TOKEN_BYTES = 16
# For tests alone: LIBRARY,FABRIC of the fake verbs (native/tests/fake_verbs.c).
TEST_VARIABLE = "FARMEM_TEST_VERBS"
_FABRIC_VARIABLE = "FARMEM_TEST_FABRIC"
# What the library and its drivers may be told by whoever starts the job.
_LIBRARY_VARIABLES = ("LD_LIBRARY_PATH", "RDMAV_", "IBV_", "MLX4_", "MLX5_")
_LISTEN_BACKLOG = 128
_ASK_SECONDS = 5.0
# The server pins all of a lease when the first queue pair is asked for.
_PINNED_BYTES_PER_SECOND = 256 << 20
_ENDED = (401, 403, 404)
_NUMBER_MAX = (1 << 24) - 1
_MTUS = (256, 512, 1024, 2048, 4096)
_REACH_HINT = (
    "see that the RDMA devices of both hosts are of one network (rdma link; ip address); "
    "--rdma-device and --rdma-gid-index choose another, and tcp:// needs none"
)


class LeaseEnded(FarmemError):
    """The server knows the lease no more."""


class Wanted(NamedTuple):
    """What the command line says about this host's device; nothing: it is chosen."""

    device: str = ""
    gid_index: int | None = None


class Peer(NamedTuple):
    """The server's half of a queue pair."""

    name: str
    words: str  # as the agent is told


class QueuePairs:
    """Which of the agent's queue pairs the server has the other half of."""

    def __init__(self, lease: Lease, server: Server, agent: Agent) -> None:
        self._lease = lease
        self._server = server
        self._agent = agent
        self._starts = agent.starts
        self._names: dict[str, str] = {}  # by the agent's number
        self._to_end: list[str] = []

    def open(self, line: str, deadline: float) -> None:
        """Get the other half for the agent.  OSError or FarmemError: there is none now."""
        number, *ours = line.split(" ")[1:]
        if self._agent.starts != self._starts:  # another agent: nothing of the old one is left
            self._starts = self._agent.starts
            self._to_end += self._names.values()
            self._names.clear()
        self._end_old(deadline)
        answer = self._lease.call("POST", "/queue-pairs", deadline, _half_of(ours))
        if answer.status // 100 != 2:
            what, hint = refusal_of(answer)
            kind = LeaseEnded if answer.status in _ENDED else FarmemError
            raise kind(f"{self._server.name} gives no queue pair: {what}", hint)
        peer = _peer_of(answer.document)
        self._names[number] = peer.name
        self._agent.tell(f"opened {number} {peer.words}")

    def refuse(self, line: str) -> None:
        """There is none: the engine will come again."""
        with contextlib.suppress(OSError):  # an agent that has ended is started again
            self._agent.tell(f"refused {line.split(' ')[1]}")

    def closed(self, line: str) -> None:
        """The agent's half is gone; so may the other be."""
        name = self._names.pop(line.split(" ")[1], None)
        if name is not None:
            self._to_end.append(name)
        with contextlib.suppress(OSError, FarmemError):
            self._end_old(time.monotonic() + _ASK_SECONDS)

    def _end_old(self, deadline: float) -> None:
        """Before a new one is asked for: nothing of an old one may come late."""
        while self._to_end:
            path = f"/queue-pairs/{self._to_end[0]}"
            answer = self._lease.call("DELETE", path, deadline)
            if answer.status not in (204, 404):
                raise FarmemError(*refusal_of(answer))
            del self._to_end[0]


class PoolRdma:
    """A server that was reached by RDMA, and the agent that speaks to it."""

    is_direct = False

    def __init__(self, pool: Pool, wanted: Wanted, tls: Tls = PLAIN) -> None:
        [self._server] = pool.servers
        self._tls = tls
        self._lease: Lease | None = None
        self._there: Any = None
        self._say: Callable[[str], None] = lambda _text: None
        self._told = ""
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._address = f"\0farmem-rdma-{secrets.token_hex(16)}"
        self._listener.bind(self._address)
        self._listener.listen(_LISTEN_BACKLOG)
        self._agent = _agent(wanted, self._token, self._listener.fileno())
        try:
            self._agent.start(time.monotonic() + START_SECONDS)
            self._open(time.monotonic() + REACH_SECONDS)
        except OSError as error:
            self.discard()
            raise unreachable(self._server, error) from error
        except FarmemError:
            self.discard()
            raise
        self.fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)  # where others have a file

    def _open(self, deadline: float) -> None:
        server = self._server
        addresses = addresses_of(server, deadline)
        control = Control(server, addresses, self._tls.toward(server, addresses))
        lease = acquire(control, server.size_bytes, host_memory_bytes(), deadline)
        self._lease = lease
        if not lease.has_rdma:
            raise FarmemError(
                f"pool {server.url!r}: {server.name} offers no RDMA",
                f"start it where it has an RDMA device, or use its TCP: tcp://{server.name}",
            )
        self.capacity_bytes = lease.size_bytes // EXTENT_BYTES * EXTENT_BYTES
        self._pairs = QueuePairs(lease, server, self._agent)
        self._try(deadline)

    def _try(self, deadline: float) -> None:
        """Read from the server's memory, and see that it can be done."""
        assert self._lease is not None
        pinning_seconds = self._lease.size_bytes / _PINNED_BYTES_PER_SECOND
        self._agent.tell("try")
        reached = False
        while (line := self._agent.hear(deadline)) is not None:
            word = line.partition(" ")[0]
            if word == "open":
                self._pairs.open(line, time.monotonic() + REACH_SECONDS + pinning_seconds)
                deadline = time.monotonic() + REACH_SECONDS
            elif word == "reached":
                reached = True
            elif word == "closed":
                self._pairs.closed(line)
                if reached:
                    return
                raise FarmemError(
                    f"pool {self._server.url!r}: {self._server.name} can't be reached by RDMA: "
                    f"{line.split(' ', 2)[2]}",
                    _REACH_HINT,
                )
            elif line.startswith("failed\t"):
                _, what, hint = line.split("\t")
                raise FarmemError(what, hint)
        raise FarmemError(f"{PROGRAM} has ended", "try again")

    def fill(self, control: Any, _ledger: Any, timeout_ns: int) -> None:
        """Tell the engine where the agent is."""
        self._there = there = control.pool_servers[0]
        address = struct.pack("=H", socket.AF_UNIX) + os.fsencode(self._address)
        way = Way(lib.FM_SERVER_NONE, address, self._token)
        fill_entry(there, self._server.name, way, timeout_ns)

    def keep(self, say: Callable[[str], None]) -> None:
        """The supervisor's: see that the memory stays ours, and that the agent runs."""
        assert self._lease is not None
        self._say = say
        self._lease.keep(say, self._is_lost)
        self._agent.keep(say, self._heard)

    def _heard(self, line: str) -> None:
        """What the agent wants, in the thread that hears it."""
        word = line.partition(" ")[0]
        if word == "open":
            try:
                self._pairs.open(line, time.monotonic() + _ASK_SECONDS)
                self._told = ""
            except (OSError, FarmemError) as error:
                self._pairs.refuse(line)
                self._tell_once(self._text_of(error))
                if isinstance(error, LeaseEnded):
                    self._is_lost()
        elif word == "closed":
            self._pairs.closed(line)
        else:
            self._tell_once(f"{PROGRAM}: {printable(line)}")

    def _text_of(self, error: OSError | FarmemError) -> str:
        if isinstance(error, FarmemError):
            return error.what
        return f"{self._server.name} can't be asked for a queue pair: {why(error)}"

    def _tell_once(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._say(f"warning: {text}")

    def _is_lost(self) -> None:
        end_entry(self._there, lib.FM_SERVER_GONE)

    def discard(self) -> None:
        """The job has ended, or never began."""
        self._agent.stop()
        if self._lease is not None:
            self._lease.release()
            self._lease = None
        self._listener.close()


def _agent(wanted: Wanted, token: bytes, listener: int) -> Agent:
    library, _, fabric = os.environ.get(TEST_VARIABLE, LIBRARY).partition(",")
    gid_index = -1 if wanted.gid_index is None else wanted.gid_index
    environment = {
        key: value for key, value in os.environ.items() if key.startswith(_LIBRARY_VARIABLES)
    }
    environment |= {"PATH": os.defpath, "LC_ALL": "C", "FARMEM_RDMA_TOKEN": token.hex()}
    if fabric:
        environment[_FABRIC_VARIABLE] = fabric
    path = program_path(PROGRAM, "libibverbs-dev")
    return Agent(path, [library, wanted.device or "any", str(gid_index)], [listener], environment)


def _half_of(words: list[str]) -> dict[str, Any]:
    """Our half, as the server is told."""
    qpn, psn, gid, lid, mtu, link, reads = words
    half = {"qpn": int(qpn), "psn": int(psn), "gid": gid, "lid": int(lid), "mtu": int(mtu)}
    return {**half, "link": link, "reads_in_flight": int(reads)}


def _peer_of(document: dict[str, Any]) -> Peer:
    """The server's half, every word of it looked at: the agent is told numbers alone."""

    def number(key: str, most: int, least: int = 0) -> int:
        value = document.get(key)
        if type(value) is not int or not least <= value <= most:
            raise FarmemError(
                f"the server's queue pair has no {key}", "see that it is of this version of farmem"
            )
        return value

    name, gid = document.get("queue_pair"), document.get("gid")
    try:
        if not isinstance(name, str) or not (name.isascii() and name.isalnum()):
            raise ValueError("it has no name")
        if not isinstance(gid, str) or "%" in gid:
            raise ValueError("it has no GID")
        address = ipaddress.IPv6Address(gid)
    except ValueError as error:
        raise FarmemError(
            f"the server's queue pair is not understood: {error}",
            "see that it is of this version of farmem",
        ) from error
    document = {"reads_in_flight": 1, **document}
    if document.get("mtu") not in _MTUS:
        document["mtu"] = None
    numbers = [
        number("lid", 0xFFFF),
        number("mtu", _MTUS[-1]),
        number("rkey", (1 << 32) - 1),
        number("address", (1 << 64) - 1),
        number("bytes", 1 << 62, EXTENT_BYTES),
        number("reads_in_flight", 255, 1),
    ]
    qpn, psn = number("qpn", _NUMBER_MAX), number("psn", _NUMBER_MAX)
    return Peer(name, " ".join(map(str, [qpn, psn, address, *numbers])))
