"""A server of a pool by RDMA: a lease of a `farmem serve`, read and written by one-sided RDMA.

The verbs are spoken by an agent of the job (rdmaagent.py): no library may live in the program's
process.  It makes our half of each queue pair; here the server is asked for the other half, over
the control channel, with the lease's token.  Before a lease is used a trial reads from the
server's memory, so that what is wrong is told in words.  Afterwards a thread of the supervisor's
answers the agent, one for each lease: a server that does not answer holds no other up.

TCP is never chosen instead: who asks for `rdma:` gets RDMA or an error.
"""

import contextlib
import ipaddress
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from farmem import _native
from farmem.errors import FarmemError
from farmem.lease import Control, Lease, refusal_of
from farmem.poolentry import Way
from farmem.pools import EXTENT_BYTES
from farmem.poolserver import PoolServer
from farmem.rdmaagent import PROGRAM, Ear, Heard, refuse
from farmem.servers import REACH_SECONDS, Address, Server, why

lib = _native.lib

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


class Peer(NamedTuple):
    """The server's half of a queue pair."""

    name: str
    words: str  # as the agent is told


class QueuePairs:
    """Which of the agent's queue pairs the server has the other half of."""

    def __init__(self, lease: Lease, server: Server, ear: Ear) -> None:
        self._lease = lease
        self._server = server
        self._ear = ear
        self._start = 0
        self._names: dict[str, str] = {}  # by the agent's number
        self._to_end: list[str] = []

    def open(self, heard: Heard, deadline: float) -> None:
        """Get the other half for the agent.  OSError or FarmemError: there is none now."""
        number, _, *ours = heard.line.split(" ")[1:]
        if heard.start != self._start:  # another agent: nothing of the old one is left
            self._start = heard.start
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
        self._ear.tell(f"opened {number} {peer.words}", heard.start)

    def closed(self, heard: Heard) -> None:
        """The agent's half is gone; so may the other be."""
        name = None
        if heard.start == self._start:
            name = self._names.pop(heard.line.split(" ")[1], None)
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


class PoolRdma(PoolServer):
    """A lease that was reached by RDMA."""

    _ear: Ear | None = None

    def _open(self, addresses: list[Address], deadline: float) -> int:
        server = self._server
        self._told = ""
        self._ear = ear = self._means.rdma.ear()
        control = Control(server, addresses, self._means.tls.toward(server, addresses))
        lease = self._acquire(control, deadline)
        if not lease.has_rdma:
            raise FarmemError(
                f"pool {server.url!r}: {server.name} offers no RDMA",
                f"start it where it has an RDMA device, or use its TCP: tcp://{server.name}",
            )
        self._pairs = QueuePairs(lease, server, ear)
        self._try(ear, lease, deadline)
        return lease.size_bytes

    @property
    def way(self) -> Way:
        """By the agent's socket, with a word for this lease."""
        assert self._ear is not None
        return Way(lib.FM_SERVER_RDMA, self._ear.address, self._ear.word)

    def _try(self, ear: Ear, lease: Lease, deadline: float) -> None:
        """Read from the server's memory, and see that it can be done."""
        pinning_seconds = lease.size_bytes / _PINNED_BYTES_PER_SECOND
        ear.begin_trial()
        reached = False
        while (heard := ear.next(deadline)) is not None:
            word = heard.line.partition(" ")[0]
            if word == "open":
                self._pairs.open(heard, time.monotonic() + REACH_SECONDS + pinning_seconds)
                deadline = time.monotonic() + REACH_SECONDS
            elif word == "reached":
                reached = True
            elif word == "closed":
                self._pairs.closed(heard)
                if not reached:
                    raise ear.failure() or self._unreached(heard.line.split(" ", 3)[3])
                return
        raise FarmemError(f"{PROGRAM} has ended", "try again")

    def _unreached(self, reason: str) -> FarmemError:
        name = self._server.name
        what = f"pool {self._server.url!r}: {name} can't be reached by RDMA: {reason}"
        return FarmemError(what, _REACH_HINT)

    def keep(self, say: Callable[[str], None]) -> None:
        """And answer the agent."""
        super().keep(say)
        threading.Thread(target=self._work, args=(self._ear, say), daemon=True).start()

    def _work(self, ear: Ear, say: Callable[[str], None]) -> None:
        """What the agent wants, for this lease."""
        while (heard := ear.next()) is not None:
            word = heard.line.partition(" ")[0]
            if word == "closed":
                self._pairs.closed(heard)
            elif word == "open":
                self._answer(ear, heard, say)

    def _answer(self, ear: Ear, heard: Heard, say: Callable[[str], None]) -> None:
        try:
            self._pairs.open(heard, time.monotonic() + _ASK_SECONDS)
            self._told = ""
        except (OSError, FarmemError) as error:
            refuse(ear.tell, heard)
            text = self._text_of(error)
            if text != self._told and self._lease is not None:
                self._told = text
                say(f"warning: {text}")
            if isinstance(error, LeaseEnded):
                self._is_lost()

    def _text_of(self, error: OSError | FarmemError) -> str:
        if isinstance(error, FarmemError):
            return error.what
        return f"{self._server.name} can't be asked for a queue pair: {why(error)}"

    def release(self) -> None:
        """And answer the agent no more."""
        if self._ear is not None:
            self._ear.close()
        super().release()


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
