"""What the checks of the doctor may ask of this host, and nothing else asks for them.

Files are read below a root folder, and what could kill whoever tries it (a seccomp filter
does that) is tried in a child, so that the doctor outlives everything it looks at.  Tests
put another Host in its place.
"""

import errno
import json
import os
import pwd
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

CHILD_SECONDS = 20.0
NO_LIMIT = -1
KILLED = -1  # in the place of an errno: a seccomp filter killed the one who tried
_CAP_SYS_PTRACE = 19
_ALL_USERS = (1 << 32) - 1
_SUPERVISOR_GRACE_SECONDS = 5.0


class Userfaultfd(NamedTuple):
    """How a userfaultfd can be had here; errnos are 0 where it worked."""

    way: str  # "system call", "device" or "none"
    features: int | None  # None: no descriptor could be asked
    syscall_errno: int
    device_errno: int
    user_mode_errno: int


class Ran(NamedTuple):
    """A child that has ended."""

    status: int  # as subprocess has it: negative for a signal
    out: str
    err: str
    timed_out: bool = False

    def last_line(self) -> str:
        """What it said last, for a person."""
        lines = self.err.strip().splitlines() or self.out.strip().splitlines()
        return lines[-1].strip() if lines else f"exit status {self.status}"


class User(NamedTuple):
    """Who runs the doctor."""

    name: str
    uid: int
    may_trace: bool  # CAP_SYS_PTRACE of the host: it grants userfaultfd too
    in_namespace: bool  # of users: what is root here is nobody special outside


class Killed(Exception):
    """A child was killed by the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"killed by {signal.Signals(number).name}")
        self.number = number


class Host:
    """This host, as the process that runs the doctor sees it."""

    def __init__(self, root: str = "") -> None:
        self._root = root
        self._calls: dict[str, int] = {}

    # ---- files --------------------------------------------------------------------------

    def path(self, path: str) -> str:
        """The path below our root folder."""
        return self._root + path

    def read(self, path: str) -> str:
        """A small file's text, without the white space around it."""
        with open(self.path(path), encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20).strip()

    def setting(self, path: str) -> int | None:
        """A number that the kernel keeps in a file; None where it knows no such setting."""
        try:
            return int(self.read(path))
        except FileNotFoundError:
            return None

    def exists(self, path: str) -> bool:
        """Whether there is such a path."""
        return os.path.lexists(self.path(path))

    def names_in(self, path: str) -> list[str]:
        """The names in a folder; none where there is no such folder."""
        try:
            return sorted(os.listdir(self.path(path)))
        except FileNotFoundError:
            return []

    def status_of(self, path: str) -> os.stat_result:
        """Whose the file is, and what its mode is."""
        return os.stat(self.path(path))

    def may_use(self, path: str) -> bool:
        """Whether this user may read and write it."""
        return os.access(self.path(path), os.R_OK | os.W_OK, effective_ids=True)

    def is_read_only(self, path: str) -> bool:
        """Whether the file system there is mounted read-only."""
        return bool(os.statvfs(self.path(path)).f_flag & os.ST_RDONLY)

    # ---- who and where ---------------------------------------------------------------------

    def uname(self) -> os.uname_result:
        """The kernel's name, release and machine."""
        return os.uname()

    def kernel_version(self) -> tuple[int, int] | None:
        """The kernel's version; None where the release says none."""
        found = re.match(r"(\d+)\.(\d+)", self.uname().release)
        return (int(found[1]), int(found[2])) if found else None

    def libc(self) -> str:
        """The C library by name and version; empty where it is not glibc."""
        try:
            return os.confstr("CS_GNU_LIBC_VERSION") or ""
        except (OSError, ValueError):
            return ""

    def environment(self) -> Mapping[str, str]:
        """The environment of the doctor."""
        return os.environ

    def process_status(self, name: str) -> str:
        """A line of /proc/self/status; empty where the kernel does not write it."""
        for line in self.read("/proc/self/status").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        return ""

    @cached_property
    def user(self) -> User:
        """Who runs this."""
        uid = os.geteuid()
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            name = str(uid)
        capabilities = int(self.process_status("CapEff") or "0", 16)
        in_namespace = self.read("/proc/self/uid_map").split() != ["0", "0", str(_ALL_USERS)]
        may_trace = bool(capabilities >> _CAP_SYS_PTRACE & 1) and not in_namespace
        return User(name, uid, may_trace, in_namespace)

    # ---- limits and memory ------------------------------------------------------------------

    def limit(self, name: str) -> tuple[int, int]:
        """The soft and the hard limit; NO_LIMIT for none."""
        soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        return _or_none(soft), _or_none(hard)

    def memory_bytes(self) -> tuple[int, int, int]:
        """This host's memory, what of it is available, and its swap."""
        import psutil

        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        return memory.total, memory.available, swap.total

    def threads_of_user(self) -> int:
        """What counts against RLIMIT_NPROC."""
        import psutil

        mine = os.getuid()
        found = psutil.process_iter(["uids", "num_threads"])
        uids = ((p.info["uids"], p.info["num_threads"]) for p in found)
        return sum(threads or 1 for ids, threads in uids if ids and ids.real == mine)

    # ---- asking the kernel --------------------------------------------------------------------

    @cached_property
    def userfaultfd(self) -> Userfaultfd:
        """How a userfaultfd can be had."""
        device_errno = self.call("DEVICE")
        user_mode_errno = self.call("USER_MODE")
        try:
            way, features, syscall_errno = _in_child(_probe)
        except Killed:
            return Userfaultfd("none", None, KILLED, device_errno, user_mode_errno)
        return Userfaultfd(
            ("none", "system call", "device")[way],
            features or None,
            _unless_short(syscall_errno),
            device_errno,
            user_mode_errno,
        )

    def call(self, name: str) -> int:
        """Try one of enum fm_probe_call: 0, its errno, or KILLED."""
        if name not in self._calls:
            try:
                self._calls[name] = _in_child(lambda: [_probe_call(name)])[0]
            except Killed:
                self._calls[name] = KILLED
        return _unless_short(self._calls[name])

    def has_module(self, name: str) -> bool:
        """Whether Python would find the module; it is not imported."""
        from importlib.util import find_spec

        return find_spec(name) is not None

    def python(
        self,
        code: str,
        *words: str,
        environment: Mapping[str, str] | None = None,
        limit_seconds: float = CHILD_SECONDS,
    ) -> Ran:
        """Run a piece of Python in a child: by the very interpreter that runs us.

        Not by its path, which an ordinary user may be unable to search.
        """
        itself = "/proc/self/exe"
        return run(
            [sys.executable, "-P", "-c", code, *words],
            executable=itself if os.path.exists(itself) else None,
            environment=environment,
            limit_seconds=limit_seconds,
        )


def _unless_short(error: int) -> int:
    """The errno, unless it only says that we are short of something: then nothing was learnt."""
    if error in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN):
        raise OSError(error, os.strerror(error))
    return error


def _or_none(limit: int) -> int:
    return NO_LIMIT if limit == resource.RLIM_INFINITY else limit


def _probe() -> list[int]:
    from farmem import checks

    probe = checks.probe_userfaultfd()
    return [probe.way, probe.features, probe.syscall_errno]


def _probe_call(name: str) -> int:
    from farmem import _native

    return int(_native.lib.fm_probe_call(getattr(_native.lib, f"FM_CALL_{name}")))


def _in_child(work: Callable[[], list[int]]) -> list[int]:
    """The numbers that the work returns, worked out by a forked child."""
    reader, writer = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            _be_the_child(work, writer)
        os.close(writer)
        writer = -1
        is_told = bool(select.select([reader], [], [], CHILD_SECONDS)[0])
        if not is_told:
            os.kill(pid, signal.SIGKILL)
        told = os.read(reader, select.PIPE_BUF) if is_told else b""
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    if not is_told:
        raise TimeoutError("the kernel did not answer")
    if os.WIFSIGNALED(status):
        raise Killed(os.WTERMSIG(status))
    answer = json.loads(told or b'"it ended too early"')
    if isinstance(answer, str):
        raise ChildProcessError(0, answer)
    return list(answer)


def _be_the_child(work: Callable[[], list[int]], writer: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            answer: list[int] | str = work()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"[:1000]
        os.write(writer, json.dumps(answer).encode())
    finally:
        os._exit(0)


def run(
    command: list[str],
    *,
    executable: str | None = None,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float = CHILD_SECONDS,
) -> Ran:
    """Run a command to its end, or to the limit; its output is small."""
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "errors": "replace", "text": True}
    with subprocess.Popen(
        command,
        executable=executable,
        env=environment,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **settings,
    ) as process:
        start = time.monotonic()
        try:
            out, err = process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            # Whoever it left behind holds the pipes until it has cleaned up, or for ever.
            try:
                out, err = process.communicate(timeout=_SUPERVISOR_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                out, err = "", ""
        timed_out = time.monotonic() - start >= limit_seconds
    return Ran(process.returncode, out, err, timed_out)
