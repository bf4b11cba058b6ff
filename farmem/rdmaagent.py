"""The agent of `rdma:` servers (native/agent/rdma_*.c): one process for all of a job's.

No library may live in the program's process, so the agent speaks the verbs.  It is begun with the
first server that needs it.  Each lease has a number, which no other ever has, and an Ear: what the
agent says of it, in order.  Whoever listens there may take its time: nobody else waits for that.

Before the program starts, what the agent says is read for as long as leases are tried, by a thread
that has ended before the supervisor is forked; afterwards the supervisor's thread hears it.
"""

import contextlib
import itertools
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from farmem.agent import START_SECONDS, Agent, program_path
from farmem.errors import FarmemError
from farmem.running import printable

PROGRAM = "farmem-rdma"
LIBRARY = "libibverbs.so.1"
TOKEN_BYTES = 16
# For tests alone: LIBRARY,FABRIC of the fake verbs (native/tests/fake_verbs.c).
TEST_VARIABLE = "FARMEM_TEST_VERBS"
_FABRIC_VARIABLE = "FARMEM_TEST_FABRIC"
# What the library and its drivers may be told by whoever starts the job.
_LIBRARY_VARIABLES = ("LD_LIBRARY_PATH", "RDMAV_", "IBV_", "MLX4_", "MLX5_")
_LISTEN_BACKLOG = 1024
_HEAR_SECONDS = 0.05
_OPEN, _CLOSED, _FAILED = "open", "closed", "failed\t"
_OF_LEASES = (_OPEN, _CLOSED, "reached")


class Wanted(NamedTuple):
    """What the command line says about this host's device; nothing: it is chosen."""

    device: str = ""
    gid_index: int | None = None


CHOSEN = Wanted()


class Heard(NamedTuple):
    """A line of the agent's, and which start of it has said it."""

    start: int
    line: str


class Ear:
    """What the agent says of one lease, and what it is told."""

    def __init__(self, agent: "RdmaAgent", number: int) -> None:
        self.number = number
        self._agent = agent
        self._heard: queue.SimpleQueue[Heard | None] = queue.SimpleQueue()

    @property
    def address(self) -> bytes:
        """Where engines join: a struct sockaddr."""
        return self._agent.address

    @property
    def word(self) -> bytes:
        """What lets an engine in, for this lease: a struct fm_rdma_pass."""
        return self._agent.token + struct.pack("=I", self.number)

    def put(self, heard: Heard | None) -> None:
        """By whoever hears the agent; None: there will be no more."""
        self._heard.put(heard)

    def next(self, deadline: float | None = None) -> Heard | None:
        """What it says next.  TimeoutError: nothing in time."""
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            return self._heard.get(timeout=wait)
        except queue.Empty as error:
            raise TimeoutError(f"{PROGRAM} does not answer") from error

    def tell(self, text: str, start: int) -> None:
        """Answer that very start of the agent.  OSError: it has gone."""
        self._agent.tell(text, start)

    def begin_trial(self) -> None:
        """Have the agent make a queue pair of its own; its end will be heard."""
        self._agent.begin_trial(self.number)

    def failure(self) -> FarmemError | None:
        """What this host lacks, if the agent has said so."""
        return self._agent.failure

    def close(self) -> None:
        """The lease has ended."""
        self._agent.forget(self.number)
        self.put(None)


class RdmaAgent:
    """The job's; it costs nothing before a server asks for it."""

    def __init__(self, wanted: Wanted) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.address = b""
        self.failure: FarmemError | None = None
        self._wanted = wanted
        self._beginning = threading.Lock()
        self._agent: Agent | None = None
        self._listener: socket.socket | None = None
        self._numbers = itertools.count()
        self._ears: dict[int, Ear] = {}
        self._trials: set[int] = set()
        self._trying = threading.Lock()
        self._hearer: threading.Thread | None = None
        self._hears = False
        self._say: Callable[[str], None] | None = None
        self._told = ""

    def ear(self) -> Ear:
        """For a new lease."""
        with self._beginning:
            if self._agent is None:
                self._agent = self._begin()
            ear = Ear(self, next(self._numbers))
            self._ears[ear.number] = ear
            return ear

    def _begin(self) -> Agent:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            name = f"\0farmem-rdma-{secrets.token_hex(16)}"
            listener.bind(name)
            listener.listen(_LISTEN_BACKLOG)
            agent = _agent(self._wanted, self.token, listener.fileno())
            agent.start(time.monotonic() + START_SECONDS)
        except (OSError, FarmemError):
            listener.close()
            raise
        self._listener = listener
        self.address = struct.pack("=H", socket.AF_UNIX) + os.fsencode(name)
        if self._say is not None:
            agent.keep(self._say, self._heard)
        return agent

    def forget(self, number: int) -> None:
        """Nobody listens for that lease any more."""
        with self._trying:
            self._trials.discard(number)
        self._ears.pop(number, None)

    def tell(self, text: str, start: int) -> None:
        """A line for one start of the agent."""
        assert self._agent is not None
        self._agent.tell(text, start)

    # ---- what it says

    def begin_trial(self, number: int) -> None:
        """See to it that somebody hears what becomes of it."""
        assert self._agent is not None
        with self._trying:
            self._trials.add(number)
            if self._say is None and not self._hears:
                self._hears = True
                self._hearer = threading.Thread(target=self._hear, daemon=True)
                self._hearer.start()
        self._agent.tell(f"try {number}")

    def _hear(self) -> None:
        """As long as something is tried."""
        assert self._agent is not None
        while True:
            with self._trying:
                if not self._trials:
                    self._hears = False
                    return
            with contextlib.suppress(TimeoutError):
                line = self._agent.hear(time.monotonic() + _HEAR_SECONDS)
                if line is None:
                    self._has_ended()
                else:
                    self._heard(line)

    def _has_ended(self) -> None:
        with self._trying:
            self._trials.clear()
        for ear in list(self._ears.values()):
            ear.put(None)

    def _heard(self, line: str) -> None:
        """By the one thread that hears it."""
        assert self._agent is not None
        word, _, number = [*line.split(" ", 3), "", ""][:3]
        if word in _OF_LEASES and number.isdecimal():
            ear = self._ears.get(int(number))
            if word == _CLOSED:
                with self._trying:
                    self._trials.discard(int(number))
            if ear is not None:
                ear.put(Heard(self._agent.tries, line))
            elif word == _OPEN:
                refuse(self._agent.tell, Heard(self._agent.tries, line))
        elif line.startswith(_FAILED):
            _, what, hint = [*line.split("\t", 2), "", ""][:3]
            self.failure = FarmemError(printable(what), printable(hint))
        elif self._say is not None and line != self._told:
            self._told = line
            self._say(f"warning: {PROGRAM}: {printable(line)}")

    # ---- its life

    def settle(self) -> None:
        """Nothing is tried for now, so nobody hears it: from here on a process may be forked."""
        with self._trying:
            self._trials.clear()
            hearer = self._hearer
        if hearer is not None:
            hearer.join()

    def keep(self, say: Callable[[str], None]) -> None:
        """The supervisor's: see that it runs."""
        with self._beginning:
            self._say = say
            if self._agent is not None:
                self._agent.keep(say, self._heard)

    def stop(self) -> None:
        """The job has ended, or never began."""
        self.settle()
        with self._beginning:
            if self._agent is not None:
                self._agent.stop()
            if self._listener is not None:
                self._listener.close()


def refuse(tell: Callable[[str, int], None], heard: Heard) -> None:
    """There is no other half now: the engine will come again."""
    with contextlib.suppress(OSError):  # an agent that has ended is started again
        tell(f"refused {heard.line.split(' ')[1]}", heard.start)


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
