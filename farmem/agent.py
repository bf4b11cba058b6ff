"""An agent: a process that does for a job what can't be done in the program's own.

Engine threads have no libc, and no library may live on the program's heap.  What needs a library
(TLS, verbs) is done by a small program in C beside the job.  Here is how it is started, heard,
started again when it dies, and ended; nothing here knows what it does.

    path = program_path("farmem-tls", "libssl-dev")   # FarmemError: not built; what to install
    agent = Agent(path, [folder, host], fds=[listener.fileno()])
    agent.start(deadline)       # before the command starts; FarmemError: it can't do its work
    agent.failure()             # why something that was tried through it went wrong, if it said so
    agent.keep(say)             # in the supervisor, and there alone: watched from now on
    agent.stop()                # the job has ended, or never began

What the program finds: its stdin, stdout and stderr are one stream socket, the *leash*; 3, 4, ...
are `fds`; nothing else is open, nothing of the caller.  It is nobody's child, in a session of its
own and in /, with SIGHUP, SIGINT, SIGTERM and SIGPIPE ignored, and its environment is what it was
given.  Only `farmem run` until it becomes the command, and then the supervisor, hold the other end
of the leash: when the program reads its end, the job has gone, and it is to end as well.  (Where
the supervisor alone was killed the command may live on: an agent may stay as long as an engine of
the job is connected to it.  Nobody starts it again then.)

What it writes are lines: `ready` once it serves, or `refused<TAB>WHAT<TAB>HINT`, and it ends.
`failed<TAB>WHAT<TAB>HINT`, at any time: something could not be done.  It writes that *before* it
shows the failure in any other way, so that whoever meets it can ask failure() for the reason.
All other lines are for `heard`; without that they are printed.  What tell() writes comes in on its
stdin.  A new start has a new leash, the same arguments and the same descriptors: who listens for
the job's engines on one of `fds` loses none that come meanwhile.
"""

import contextlib
import fcntl
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from farmem import _native
from farmem.errors import FarmemError
from farmem.restarts import Pauses, Talk
from farmem.running import printable

START_SECONDS = 5.0
STOP_SECONDS = 1.0
_LINE_BYTES_MAX = 4096
_LINES_WAITING_MAX = 64
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
_READY, _REFUSED, _FAILED = "ready", "refused", "failed"
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


def program_path(name: str, package: str) -> str:
    """Where a program of ours lies: beside the extension; `package` is what it is built with."""
    path = os.path.join(os.path.dirname(_native.__file__), name)
    if not os.access(path, os.X_OK):
        raise FarmemError(
            f"this farmem was built without {name}",
            f"apt-get install {package}, then build farmem again: make clean build",
        )
    return path


class Agent:
    """One program, as long as the job needs it."""

    def __init__(
        self,
        path: str,
        arguments: Sequence[str],
        fds: Sequence[int] = (),
        environment: Mapping[str, str] = _ENVIRONMENT,
    ) -> None:
        self.name = os.path.basename(path)
        self.starts = 0
        self.tries = 0  # of starting it: which of them is heard and told
        self._path = path
        self._arguments = [self.name, *arguments]
        self._fds = list(fds)
        self._environment = dict(environment)
        self._leash: socket.socket | None = None
        self._pidfd = -1
        self._rest = b""
        self._lines: list[str] = []
        self._ended = False
        self._keeper: threading.Thread | None = None
        self._ending = threading.Lock()  # of the leash and the process
        self._telling = threading.Lock()
        self._pauses = Pauses()
        self._talk = Talk()

    def start(self, deadline: float) -> None:
        """Start it, and wait until it serves."""
        self._spawn()
        try:
            line = self.hear(deadline)
            while line is not None and line != _READY and not line.startswith(_REFUSED + "\t"):
                self._lines.append(line)  # what a library has to say first
                line = self.hear(deadline, waiting=False)
        except TimeoutError as error:
            self._abandon()
            raise FarmemError(f"{self.name} does not start", "try again") from error
        self.starts += 1
        if line == _READY:
            return
        said = line or (self._lines[-1] if self._lines else "")
        self._abandon()
        if not said.startswith(_REFUSED + "\t"):
            said = f"{_REFUSED}\t{self.name} has ended: {said or 'without a word'}\ttry again"
        raise _error_of(said)

    def tell(self, line: str, start: int | None = None) -> None:
        """Write a line to its stdin, or to that of one start of it.  OSError: it has gone."""
        with self._ending:
            leash = self._leash if start in (None, self.tries) else None
        if leash is None:
            raise ConnectionResetError(f"{self.name} has ended")
        with self._telling:
            leash.sendall(line.encode() + b"\n")

    def hear(self, deadline: float | None = None, *, waiting: bool = True) -> str | None:
        """The next line that it writes; None: it has ended.  TimeoutError: not in time."""
        if waiting and self._lines:
            return self._lines.pop(0)
        while b"\n" not in self._rest[:_LINE_BYTES_MAX] and len(self._rest) < _LINE_BYTES_MAX:
            chunk = self._receive(deadline)
            if not chunk:
                return None
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line[:_LINE_BYTES_MAX].decode(errors="replace")

    def failure(self) -> FarmemError | None:
        """The last failure that it has told; what else it has said stays to be heard."""
        last: str | None = None
        waiting: list[str] = []
        with contextlib.suppress(TimeoutError):
            while (line := self.hear(time.monotonic())) is not None:
                if line.startswith(_FAILED + "\t"):
                    last = line
                else:
                    waiting.append(line)
        self._lines = waiting[-_LINES_WAITING_MAX:]
        return None if last is None else _error_of(last)

    def keep(self, say: Callable[[str], None], heard: Callable[[str], None] | None = None) -> None:
        """Hear it from now on, and start it again when it dies; from a thread."""

        def aloud(line: str) -> None:
            if self._talk.may():
                say(f"{self.name}: {printable(line)}")

        work = (say, heard or aloud)
        self._keeper = threading.Thread(target=self._work, args=work, daemon=True)
        self._keeper.start()

    def stop(self) -> None:
        """End it: it is told so by the end of its leash, and killed if it does not listen."""
        self._ended = True
        if self._keeper is None:
            self._abandon()
        else:
            self._end_process()  # the thread that reads the leash closes it

    # ---- the inside

    def _receive(self, deadline: float | None) -> bytes:
        """Some bytes; none at its end."""
        assert self._leash is not None
        left_ms = None if deadline is None else max(0.0, (deadline - time.monotonic()) * 1000)
        poll = select.poll()
        poll.register(self._leash, select.POLLIN)
        if not poll.poll(left_ms):
            raise TimeoutError(f"{self.name} does not answer")
        try:
            return self._leash.recv(_LINE_BYTES_MAX)
        except ConnectionError:
            return b""

    def _work(self, say: Callable[[str], None], heard: Callable[[str], None]) -> None:
        while not self._ended:
            line = self.hear()
            if self._ended:
                break
            if line is None:
                self._start_again(say)
            elif line.startswith(_FAILED + "\t"):
                if self._talk.may():
                    say(f"warning: {_error_of(line).what}")
            else:
                heard(line)
        self._abandon()

    def _start_again(self, say: Callable[[str], None]) -> None:
        """Until it serves.  What it did meanwhile waits, as long as the pool's time-out allows."""
        say(f"warning: {self.name} has ended; it is started again")
        told = ""
        while not self._ended:
            time.sleep(self._pauses.next_seconds())
            self._abandon()
            try:
                self.start(time.monotonic() + START_SECONDS)
                return
            except (FarmemError, OSError) as error:
                if str(error) != told:
                    told = str(error)
                    say(f"warning: {self.name} can't be started again: {told.splitlines()[0]}")

    def _spawn(self) -> None:
        """Start the process, twice removed, so that it is not the command's child."""
        ours, theirs = socket.socketpair()
        told, tell = socket.socketpair()
        with theirs, told, tell:
            middle = os.fork()
            if middle == 0:
                self._be_middle(theirs.fileno(), tell)
            with contextlib.suppress(ChildProcessError):  # the caller ignores SIGCHLD
                os.waitpid(middle, 0)
            tell.close()
            _, pidfds, _, _ = socket.recv_fds(told, 1, 1)
        with self._ending:
            self._leash, self._rest, self._lines = ours, b"", []
            self.tries += 1
        if not pidfds:
            self._abandon()
            raise FarmemError(f"{self.name} could not be started", "try again")
        self._pidfd = pidfds[0]
        os.set_inheritable(self._pidfd, False)

    def _be_middle(self, leash: int, tell: socket.socket) -> NoReturn:
        try:
            os.setsid()
            pid = os.fork()
            if pid == 0:
                self._become(leash)
            socket.send_fds(tell, [b"x"], [os.pidfd_open(pid)])
            os._exit(0)
        finally:
            os._exit(1)

    def _become(self, leash: int) -> NoReturn:
        """In the new process: nothing of anybody's but what it is given."""
        try:
            given = [leash, leash, leash, *self._fds]
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(given)) for fd in given]
            for number, fd in enumerate(high):
                os.dup2(fd, number)
            for name in os.listdir("/proc/self/fd"):
                if int(name) >= len(given):
                    with contextlib.suppress(OSError):  # the folder's own has gone by now
                        os.close(int(name))
            os.chdir("/")
            for ignored in _IGNORED:
                signal.signal(ignored, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            os.execve(self._path, self._arguments, self._environment)
        except BaseException as error:
            os.write(2, f"refused\t{self.name} can't be executed: {error}\ttry again\n".encode())
        finally:
            os._exit(127)

    def _abandon(self) -> None:
        """By whoever hears it."""
        self._end_process()
        with self._ending:
            leash, self._leash = self._leash, None
        if leash is not None:
            leash.close()

    def _end_process(self) -> None:
        """By stop(), or by the thread that hears it: that one may be reading the leash."""
        with self._ending:
            if self._leash is not None:
                with contextlib.suppress(OSError):  # it has gone already
                    self._leash.shutdown(socket.SHUT_RDWR)
            if self._pidfd < 0:
                return
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(STOP_SECONDS * 1000):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1


def _error_of(line: str) -> FarmemError:
    _, what, hint = (*line.split("\t", 2), "", "")[:3]
    return FarmemError(printable(what), printable(hint))
