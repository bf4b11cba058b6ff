"""The supervisor of a job: one small process that outlives the command by a moment.

It gives out slots of the ledger, holds a duplicate of every userfaultfd until its process
has gone (when the last copy goes, missing pages read as zeros, even in a dying program's
last write), prints what the engine has to say, cleans up after the dead, answers `farmem stat`
and `farmem set`, and writes the statistics.  It is forked from the command line's process and
must stay small: no heavy imports, no descriptor of the caller but stderr, nothing that can
block for long.
"""

import contextlib
import fcntl
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from farmem import _native
from farmem.answers import Answers, may_ask
from farmem.budget import Budget
from farmem.comers import on_the_way
from farmem.job import LISTEN_BACKLOG, Job
from farmem.messages import Printer, Ring
from farmem.slots import Slots
from farmem.statistics import Joined, job_statistics, job_status, summary, write_statistics
from farmem.wire import Connection, Hello, Question, Wire, peer_of

lib = _native.lib

POLL_PAGING_SECONDS = 0.02
POLL_IDLE_SECONDS = 0.05
# A child may be between its fork and its hello when its parent ends: so long nobody looks for any,
# and so long whoever is seen to be on the way is waited for.
END_GRACE_NS = 60_000_000
COMERS_GRACE_NS = 10_000_000_000
# Long enough for a command's children to end with it and have their summary printed.
STDERR_GRACE_NS = 100_000_000
FLUSH_SECONDS = 1.0
# Connections that have said nothing yet.  An engine speaks at once; whoever is silent while so
# many come after it is closed, so that strangers can't use up our descriptors.
SILENT_MAX = 64
_STDERR = 2


class Process:
    """A process of the job."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.slot: int | None = None
        self.userfaultfds: list[int] = []
        self.has_connected = False
        self.was_adopted = False  # an image of it that has been replaced

    def has_ended(self) -> bool:
        """Whether the process that the pidfd stands for has gone (the pid may be another's)."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))


class Supervisor:
    """The loop, and the books that it keeps."""

    def __init__(self, job: Job, root_pid: int, root_pidfd: int) -> None:
        self._job = job
        self._slots = Slots(job)
        self._budget = Budget(job.control)
        self._answers = Answers(self._budget, self._status)
        self._ring = Ring(job.control, lib.FM_LEVEL_WARNING if job.request.quiet else 0)
        self._printer = Printer()
        self._wire = Wire(job.token)
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._silent: dict[int, Connection] = {}
        self._processes: dict[int, Process] = {}
        self._root = Process(root_pid, root_pidfd)
        self._watch(self._root)
        self._connected = 0
        self._adopted = 0
        self._alone_since_ns = 0
        self._stderr_kept = True
        # Once more, by us: whoever connects is told the pid of the process that listened last.
        job.listener.listen(LISTEN_BACKLOG)
        self._handle(job.listener.fileno(), self._accept)

    def run(self) -> None:
        """Serve until the last process has gone."""
        while not self._is_over():
            paging = any(map(self._is_adopted, self._processes.values()))
            seconds = POLL_PAGING_SECONDS if paging else POLL_IDLE_SECONDS
            for fd, _ in self._epoll.poll(seconds):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()
            self._close_silent()
            self._slots.sample()
            self._budget.look()
            if self._slots.has_orphans:
                self._slots.release_orphans()
            self._print_messages()

    def finish(self, was_launched: bool) -> None:
        """Write what is left of the job."""
        self._print_messages(is_last=True)
        if was_launched:
            statistics = job_statistics(self._job, self._slots, self._budget, self._joined())
            if self._job.request.stats_path:
                self._write_statistics(statistics)
            line = summary(statistics)
            if line and not self._job.request.quiet:
                self._printer.say(line)
        self._printer.flush(FLUSH_SECONDS)

    def hold_until_gone(self) -> None:
        """After a failure of ours: serve nobody, but lose no userfaultfd of a live process."""
        for process in self._processes.values():
            select.select([process.pidfd], [], [])

    def say(self, text: str) -> None:
        """Print a line on the caller's stderr."""
        self._printer.say(f"farmem: {text}")

    def _joined(self) -> Joined:
        live = sum(map(self._is_adopted, self._processes.values()))
        return Joined(self._connected, self._adopted + live)

    def _is_adopted(self, process: Process) -> bool:
        slot = process.slot
        return process.was_adopted or (slot is not None and self._slots.is_adopted(slot))

    def _status(self) -> dict[str, object]:
        return job_status(self._job, self._slots, self._budget, self._joined())

    def _write_statistics(self, statistics: dict[str, object]) -> None:
        path = self._job.request.stats_path
        try:
            write_statistics(path, statistics)
        except OSError as error:
            self.say(f"the statistics could not be written to {path}: {error.strerror}")

    def _is_over(self) -> bool:
        """The last process has gone, and nobody has come for a moment."""
        now_ns = time.monotonic_ns()
        if self._root.pid in self._processes:
            return False
        self._alone_since_ns = self._alone_since_ns or now_ns
        waited_ns = now_ns - self._alone_since_ns
        if self._processes:
            # The command has gone and its daemons live on: nobody waits for our words.
            if self._stderr_kept and waited_ns > STDERR_GRACE_NS:
                self._stderr_kept = False
                self._printer.release()
            return False
        if waited_ns <= END_GRACE_NS or self._slots.release_orphans():
            return False
        return waited_ns > COMERS_GRACE_NS or not on_the_way(self._job.name)

    def _print_messages(self, is_last: bool = False) -> None:
        for line in self._ring.read(is_last):
            self._printer.say(line)

    def _handle(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unhandle(self, fd: int) -> None:
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def _accept(self) -> None:
        try:
            sock, _ = self._job.listener.accept()
        except OSError:
            return  # it gave up, or we are out of descriptors: it will see the job as gone
        peer = peer_of(sock)
        if peer is None:
            sock.close()
            return
        connection = Connection(sock, peer)
        self._silent[sock.fileno()] = connection
        self._handle(sock.fileno(), lambda: self._serve(connection))

    def _close(self, connection: Connection) -> None:
        self._unhandle(connection.sock.fileno())
        self._silent.pop(connection.sock.fileno(), None)
        connection.close()

    def _close_silent(self) -> None:
        """Only between two looks at what is ready: a number must not come to mean another
        descriptor while there is something to be done about it."""
        while len(self._silent) > SILENT_MAX:
            self._close(next(iter(self._silent.values())))

    def _serve(self, connection: Connection) -> None:
        """One message; whoever says anything unexpected is cut off."""
        try:
            message = self._wire.receive(connection)
        except BlockingIOError:
            return
        if message is None or isinstance(message, Question):
            if message is not None:
                self._answer(connection, message)
            self._close(connection)
            return
        kept = False
        process = self._processes.get(connection.pid) if connection.is_known else None
        if isinstance(message, Hello):
            kept = self._welcome(connection, message)
        elif process is not None:
            self._hold(process, message)
            kept = True
        else:
            for fd in message:
                os.close(fd)
        if kept:
            self._silent.pop(connection.sock.fileno(), None)
        else:
            self._close(connection)

    def _answer(self, connection: Connection, question: Question) -> None:
        if may_ask(connection.uid):
            self._wire.send_answer(connection, self._answers.to(question.text))
        else:
            self._wire.send_refused(connection)

    def _welcome(self, connection: Connection, hello: Hello) -> bool:
        """Give the process a slot, or refuse it."""
        slot = self._slot_for(connection, hello) if hello.is_valid else None
        if slot is None:
            self._wire.send_refused(connection)
            return False
        connection.is_known = True
        job = self._job
        fds = [job.control_memory.fd, job.ledger.fd, job.pool.fd]
        return self._wire.send_welcome(connection, slot, fds)

    def _slot_for(self, connection: Connection, hello: Hello) -> int | None:
        process = self._processes.get(connection.pid)
        if process is not None and process.has_ended():
            self._end(process)
            process = None
        if process is not None and process.slot is not None:
            self._forget_image(process)
        if hello.slot == lib.FM_SLOT_ANY:
            slot = self._slots.take(connection.pid)
        else:
            slot = hello.slot if self._slots.take_reserved(hello.slot, connection.pid) else None
        if slot is None:
            return None
        if process is None:
            process = Process(connection.pid, connection.take_pidfd())
            self._watch(process)
        if not process.has_connected:
            process.has_connected = True
            self._connected += 1
        process.slot = slot
        return slot

    def _hold(self, process: Process, fds: list[int]) -> None:
        """Keep the duplicates until the process has gone."""
        if self._job.control.defects & lib.FM_DEFECT_NO_DUPLICATE:
            for fd in fds:
                os.close(fd)
        else:
            process.userfaultfds += fds

    def _watch(self, process: Process) -> None:
        self._processes[process.pid] = process
        self._handle(process.pidfd, lambda: self._look(process))

    def _look(self, process: Process) -> None:
        # What was ready may have been another descriptor of the same number, closed just now:
        # a process that lives must never lose its duplicates.
        if process.has_ended():
            self._end(process)

    def _forget_image(self, process: Process) -> None:
        """What the process ran is gone (it died, or it has executed something else)."""
        for fd in process.userfaultfds:
            os.close(fd)
        process.userfaultfds = []
        process.was_adopted = self._is_adopted(process)
        if process.slot is not None:
            self._slots.give_back(process.slot)
        process.slot = None

    def _end(self, process: Process) -> None:
        self._unhandle(process.pidfd)
        self._forget_image(process)
        self._adopted += process.was_adopted
        os.close(process.pidfd)
        del self._processes[process.pid]
        self._slots.release_orphans()


def _drop_callers_descriptors() -> None:
    """Close what the command is about to inherit: a pipe's reader waits for its last writer.

    All that is ours is close-on-exec, all that is the caller's is not.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):  # the folder's own descriptor is gone by now
            if fd > _STDERR and not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(fd)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _become_supervisor() -> None:
    _drop_callers_descriptors()
    os.chdir("/")
    # For each process a pidfd, a connection and a userfaultfd; the limit is the command's.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Whoever stops the job (a service manager, a container's end) signals every process of
    # it. We must outlive the program all the same: its last writes need our duplicates of
    # its userfaultfds, and its statistics are still to be written. We end by ourselves.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write("farmem-job")
    lib.fm_choose_soon()  # a program that is not in the job yet may fill its memory meanwhile


class Launch(NamedTuple):
    """What the supervisor needs to know of the command that is about to be started."""

    root_pid: int
    root_pidfd: int
    called_off: int  # a pipe: has a byte when the command could not start
    tell_ready: int  # a pipe: gets a byte when the supervisor serves


def supervise(job: Job, launch: Launch) -> NoReturn:
    """Be the supervisor of a job."""
    status = 1
    try:
        _become_supervisor()
        supervisor = Supervisor(job, launch.root_pid, launch.root_pidfd)
        try:
            os.write(launch.tell_ready, b"x")
            os.close(launch.tell_ready)
            job.pool.keep(supervisor.say)
            supervisor.run()
            supervisor.finish(was_launched=not os.read(launch.called_off, 1))
            status = 0
        except Exception as error:
            supervisor.say(f"the supervisor failed: {type(error).__name__}: {error}")
            supervisor.hold_until_gone()
    finally:
        job.pool.discard()
        os._exit(status)
