"""A job: one command and its descendants, with one budget and one pool.

Makes the job's shared memory (control segment, pool ledger, pool) and its socket,
forks the supervisor, and execs the command in this very process.  Nothing of ours may
reach the command but two words in its environment: every descriptor here is
close-on-exec, and signals, umask and working directory are left alone.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from farmem import _native
from farmem.errors import EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, FarmemError
from farmem.filters import Filter, write_filters
from farmem.pools import Pool, smaller_pool_hint
from farmem.sizes import format_bytes
from farmem.tls import Tls

if TYPE_CHECKING:
    from farmem.poolfile import PoolFile
    from farmem.poolservers import PoolServers

ffi, lib = _native.ffi, _native.lib

_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3; not in Python's os yet
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
LISTEN_BACKLOG = 128
JOB_VARIABLE = b"FARMEM_JOB"
DEFECTS_VARIABLE = b"FARMEM_TEST_DEFECTS"
EVICT_VARIABLE = b"FARMEM_TEST_EVICT"
FILE_IO_VARIABLE = b"FARMEM_TEST_FILE_IO"
POOL_TIMEOUT_NS = 30_000_000_000


class Request(NamedTuple):
    """What was asked for, checked."""

    command: tuple[str, ...]
    budget_bytes: int
    pool: Pool
    filters: list[Filter]
    stats_path: str
    quiet: bool
    no_pinned_io: bool
    userfaultfd_way: int
    defects: int = 0
    evict_mode: int = 0
    file_io: int = 0
    file_direct: bool = True
    pool_timeout_ns: int = POOL_TIMEOUT_NS
    tls: Tls = Tls()
    rdma_device: str = ""
    rdma_gid_index: int | None = None


class Memory:
    """A memfd, mapped here."""

    is_direct = False

    def __init__(self, name: str, size_bytes: int) -> None:
        self.fd = memfd(name)
        os.ftruncate(self.fd, size_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self.map = mmap.mmap(self.fd, size_bytes)
        self.pointer: Any = ffi.from_buffer(self.map)

    def keep(self, say: Callable[[str], None]) -> None:
        """Nothing to do: memory stays."""

    def discard(self) -> None:
        """Nothing to do: it goes with the last process that has it."""


def memfd(name: str) -> int:
    """A new, empty memfd that can be sealed."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


class Job:
    """The shared memory and the socket of a job that is about to start."""

    def __init__(self, request: Request) -> None:
        self.started_ns = time.monotonic_ns()
        self.name = f"farmem-{secrets.token_hex(8)}"
        self.token = secrets.token_bytes(lib.FM_TOKEN_BYTES)
        self.control_memory = Memory("farmem-control", ffi.sizeof("struct fm_control"))
        self.control: Any = ffi.cast("struct fm_control *", self.control_memory.pointer)
        self.pool, self.request = _open_pool(request)
        try:
            self.ledger = _open_ledger(self.request.pool)
            self._fill_control()
            self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.listener.bind(f"\0{self.name}")
            self.listener.listen(LISTEN_BACKLOG)
            self.listener.setblocking(False)
        except (FarmemError, OSError):
            self.pool.discard()
            raise

    def _fill_control(self) -> None:
        request, control = self.request, self.control
        control.magic = lib.FM_CONTROL_MAGIC
        control.version = lib.FM_CONTROL_VERSION
        control.bytes = ffi.sizeof("struct fm_control")
        control.procs_max = lib.FM_PROCS_MAX
        control.flags = lib.FM_FLAG_NO_PINNED_IO if request.no_pinned_io else 0
        control.flags |= lib.FM_FLAG_POOL_DIRECT if self.pool.is_direct else 0
        control.budget_bytes = request.budget_bytes
        control.pool_bytes = request.pool.capacity_bytes
        control.defects = request.defects
        control.evict_mode = request.evict_mode
        control.backend = lib.FM_BACKEND_FILE if request.pool.path else lib.FM_BACKEND_MEM
        if request.pool.is_elsewhere:
            there: Any = self.pool  # on servers
            control.backend = lib.FM_BACKEND_SERVERS
            there.fill(control, self.ledger.pointer, request.pool_timeout_ns)
        control.file_io = request.file_io
        control.userfaultfd_way = request.userfaultfd_way
        ffi.memmove(control.secret, os.urandom(lib.FM_SECRET_BYTES), lib.FM_SECRET_BYTES)
        write_filters(request.filters, control, lib)

    def environment(self, inherited: dict[bytes, bytes], library: str) -> dict[bytes, bytes]:
        """The command's environment: its own, our library first, and the way to the job."""
        preload = os.fsencode(library)
        if inherited.get(b"LD_PRELOAD"):
            preload += b":" + inherited[b"LD_PRELOAD"]
        word = f"{self.name}:{self.token.hex()}".encode()
        return {**inherited, b"LD_PRELOAD": preload, JOB_VARIABLE: word}


def _memory_for(pool: Pool, name: str, size_bytes: int) -> Memory:
    try:
        return Memory(name, size_bytes)
    except (OSError, OverflowError, ValueError) as error:
        size = format_bytes(pool.capacity_bytes)
        why = error.strerror if isinstance(error, OSError) else error
        raise FarmemError(
            f"pool {pool.url!r} ({size}) can't be opened: {why}", smaller_pool_hint(pool)
        ) from error


def _open_ledger(pool: Pool) -> Memory:
    ledger = _memory_for(pool, "farmem-ledger", lib.fm_pool_ledger_bytes(pool.capacity_bytes))
    begin = lib.fm_pool_ledger_init_empty if pool.is_elsewhere else lib.fm_pool_ledger_init
    if begin(ledger.pointer, pool.capacity_bytes) != 0:
        raise FarmemError(
            f"pool {pool.url!r} is larger than a job can address", smaller_pool_hint(pool)
        )
    return ledger


def _open_elsewhere(request: Request) -> "PoolServers":
    from farmem.poolservers import PoolServers
    from farmem.rdmaagent import Wanted

    rdma = Wanted(request.rdma_device, request.rdma_gid_index)
    return PoolServers(request.pool, request.budget_bytes, request.tls, rdma)


def _open_pool(request: Request) -> "tuple[Memory | PoolFile | PoolServers, Request]":
    """The pool, and the request with what the pool is known to have now."""
    pool = request.pool
    if pool.is_elsewhere:
        there = _open_elsewhere(request)
        return there, request._replace(pool=pool._replace(capacity_bytes=there.capacity_bytes))
    if pool.path:
        from farmem.poolfile import PoolFile

        return PoolFile(pool, request.file_direct), request
    return _memory_for(pool, "farmem-pool", pool.capacity_bytes), request


def inherited_environment() -> dict[bytes, bytes]:
    """The environment as the caller gave it.

    Not os.environb: Python itself adds LC_CTYPE to that in a C locale, and the command
    must not see it.
    """
    with open("/proc/self/environ", "rb") as file:
        words = file.read().split(b"\0")
    pairs = (word.partition(b"=") for word in words if b"=" in word)
    return {name: value for name, _, value in pairs}


def _fork_supervisor(job: Job) -> int:
    """Fork the supervisor twice, so that it is nobody's child; the pipe to call it off with.

    Returns when it serves: a program can fill its budget in less time than a Python needs to
    begin, and could not be managed until then.
    """
    from farmem.supervisor import Launch, supervise

    root_pid = os.getpid()
    root_pidfd = os.pidfd_open(root_pid)
    called_off, call_off = os.pipe()
    ready, tell_ready = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.close(call_off)
                os.close(ready)
                supervise(job, Launch(root_pid, root_pidfd, called_off, tell_ready))
            os._exit(0)
        finally:
            os._exit(1)
    for fd in (root_pidfd, called_off, tell_ready):
        os.close(fd)
    with contextlib.suppress(ChildProcessError):  # the caller ignores SIGCHLD
        os.waitpid(middle, 0)
    serves = os.read(ready, 1)
    os.close(ready)
    if not serves:
        os.close(call_off)
        raise FarmemError("the supervisor could not be started", "try again")
    return call_off


def launch(job: Job, path: str, environment: dict[bytes, bytes]) -> NoReturn:
    """Start the supervisor and become the command."""
    try:
        call_off = _fork_supervisor(job)
    except (FarmemError, OSError):
        job.pool.discard()
        raise
    # Python ignores these two from its start on; the command must not.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    command = list(job.request.command)
    try:
        try:
            os.execve(path, command, environment)
        except OSError as error:
            if error.errno != errno.ENOEXEC or _looks_binary(path):
                raise
            # What execvp does with a script that has no #! line.
            os.execve("/bin/sh", ["/bin/sh", path, *command[1:]], environment)
    except OSError as error:
        os.write(call_off, b"x")
        status = EXIT_NOT_FOUND if error.errno == errno.ENOENT else EXIT_NOT_EXECUTABLE
        raise FarmemError(f"{path}: {error.strerror}", "check the command", status) from error


def _looks_binary(path: str) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(128)
