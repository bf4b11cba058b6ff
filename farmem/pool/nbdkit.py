"""The data plane: an nbdkit with our plugin, started and looked after.

nbdkit inherits the listening sockets (so they stay open while it is started again), the
memory and the lease table.  If it dies, it is started again and leases live on: what was
acknowledged lies in the memory, which is ours, and clients send again what was not.  If we
die, the kernel kills it.
"""

import asyncio
import fcntl
import os
import re
import shutil
import signal
import socket
import sys
import time
from typing import NoReturn

from farmem import _native
from farmem.errors import FarmemError
from farmem.pool.leases import Table
from farmem.pool.memory import Memory
from farmem.pool.tls import Tls, nbdkit_words
from farmem.restarts import Pauses, Talk
from farmem.running import printable

lib = _native.lib

PLUGIN = "nbdkit-farmem-plugin.so"
# Of each connection, one: nbdkit 1.32 aborts when a client hangs up, or sends rubbish, while
# another thread of that connection answers.  Clients that want more at once open more connections.
THREADS = 1
START_SECONDS = 10.0
STOP_SECONDS = 2.0
# It is started again as often as it dies, less and less eagerly: ending the server would lose what
# is lent.  Only if it dies so often without having served at all, there is nothing to be hoped for.
USELESS_STARTS_MAX = 5
_LOOK_SECONDS = 0.01
_LINE_CHARACTERS = 300
_READ_BYTES = 65536
_FIRST_FD = 3
_FD_ROOM = 256  # above all descriptors that a child is given
_TOKEN = re.compile(r"[0-9a-fA-F]{16,}")


def find_program() -> str:
    """nbdkit, or what to install."""
    path = shutil.which("nbdkit")
    if path is None:
        raise FarmemError("nbdkit is not installed", "install it: apt-get install nbdkit")
    return path


def find_plugin() -> str:
    """Our plugin, beside the extension."""
    path = os.path.join(os.path.dirname(_native.__file__), PLUGIN)
    if not os.path.exists(path):
        raise FarmemError(
            "this farmem was built without its nbdkit plugin",
            "apt-get install nbdkit-plugin-dev, then build farmem again: make clean build",
        )
    return path


class Log:
    """What nbdkit has to say, to our own stderr: a few lines a second, and never a token."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._rest = b""
        self._talk = Talk()
        self.last = ""

    def read(self) -> None:
        """Called when there is something."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_READ_BYTES:]
        for line in lines:
            self._say(line.decode(errors="replace"))

    def _say(self, line: str) -> None:
        text = _TOKEN.sub("...", line.removeprefix("nbdkit: "))[:_LINE_CHARACTERS]
        self.last = printable(text)
        if self._talk.may():
            print(f"farmem: nbdkit: {self.last}", file=sys.stderr, flush=True)


class Door:
    """One nbdkit, and the sockets that it serves."""

    def __init__(
        self,
        index: int,
        listening: list[socket.socket],
        memory: Memory,
        table: Table,
        tls: Tls,
    ) -> None:
        self.index = index
        self._tls = tls
        self.restarts = 0
        self.pid = 0
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._program, self._plugin = find_program(), find_plugin()
        self._listening = listening
        self._memory = memory
        self._table = table
        self._pidfd = -1
        self._is_stopping = False
        self._has_served = False
        self._pauses = Pauses()
        self._useless_starts = 0
        read, self._log_fd = os.pipe()
        self._log = Log(read)
        asyncio.get_running_loop().add_reader(read, self._log.read)

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        self._spawn()
        end = time.monotonic() + START_SECONDS
        while self._table.struct.doors[self.index].pid != self.pid or not self.pid:
            if self.failed.done():
                self.failed.result()
            if time.monotonic() > end:
                raise FarmemError(
                    f"nbdkit does not start: {self._log.last or 'it says nothing'}",
                    f"try: {self._program} --dump-plugin {self._plugin}",
                )
            await asyncio.sleep(_LOOK_SECONDS)
        self._has_served = True

    async def stop(self) -> None:
        """End it: politely, then not."""
        self._is_stopping = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + STOP_SECONDS
            if self.pid:
                signal.pidfd_send_signal(self._pidfd, number)
            while self.pid and time.monotonic() < end:
                await asyncio.sleep(_LOOK_SECONDS)

    def _spawn(self) -> None:
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become(self._program, self._arguments(parent), self._fds(), self._log_fd)
        self._pidfd = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)

    def _fds(self) -> list[int]:
        listening = [sock.fileno() for sock in self._listening]
        return [*listening, self._memory.fd, self._table.fd]

    def _arguments(self, parent: int) -> list[str]:
        memory = _FIRST_FD + len(self._listening)
        return [
            "nbdkit", "--foreground", "--log=stderr", f"--threads={THREADS}",
            *nbdkit_words(self._tls), self._plugin, f"memory={memory}", f"table={memory + 1}",
            f"door={self.index}", f"parent={parent}",
        ]  # fmt: skip

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._pidfd)
        self.pid, was_ready = 0, self._table.struct.doors[self.index].pid != 0
        lib.fm_lease_door_gone(self._table.struct, self.index)
        self._log.read()
        if self._is_stopping:
            return
        how = f"signal {-status}" if status < 0 else f"status {status}"
        said = f"nbdkit has ended with {how} ({self._log.last or 'without a word'})"
        self._useless_starts = 0 if was_ready else self._useless_starts + 1
        if not self._has_served or self._useless_starts == USELESS_STARTS_MAX:
            self.failed.set_exception(FarmemError(said, "what it said stands above"))
            return
        print(
            f"farmem: warning: {said}; it is started again, and every lease lives on",
            file=sys.stderr,
            flush=True,
        )
        loop.call_later(self._pauses.next_seconds(), self._spawn_again)

    def _spawn_again(self) -> None:
        if not self._is_stopping:
            self.restarts += 1
            self._spawn()


def _become(program: str, arguments: list[str], fds: list[int], log_fd: int) -> NoReturn:
    """In the child: nothing of ours but what it is given, and a session of its own."""
    try:
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FD_ROOM) for fd in (log_fd, *fds)]
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(high[0], 1)
        os.dup2(high[0], 2)
        for number, fd in enumerate(high[1:], _FIRST_FD):
            os.dup2(fd, number)
        os.closerange(_FIRST_FD + len(fds), _FD_ROOM)
        os.setsid()
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGHUP):
            signal.signal(signal_number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
        environment["LISTEN_PID"] = str(os.getpid())
        environment["LISTEN_FDS"] = str(len(fds) - 2)
        os.execve(program, arguments, environment)
    except BaseException as error:
        os.write(2, f"can't be executed: {error}\n".encode())
    finally:
        os._exit(127)
