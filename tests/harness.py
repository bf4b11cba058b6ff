"""What the tests that run real programs share: compiling, running, looking after.

Programs are run plain (`run_plain`) or under `farmem run` (`run_farmem`,
`start_farmem`).  Nothing here knows the engine: it reads the statistics that the
command line writes, and /proc.  Output is read by threads and not waited for beyond
a moment, so that a daemon that holds a pipe can't hold the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from tests.sampler import Sampler

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "safety"
BUILD = ROOT / "build" / "test-programs"
FARMEM = ROOT / ".venv" / "bin" / "farmem"
COMPILE = (
    "cc",
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O2",
    "-g",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Werror",
)
# A program that can't do its test here (no io_uring, say) ends with this and a reason.
EXIT_UNSUPPORTED = 77
# farmem's own failures: never the verdict of a program.
EXIT_FARMEM = (125, 126, 127)


@dataclasses.dataclass
class Result:
    """What came of a command under `farmem run`."""

    returncode: int
    stdout: bytes
    stderr: bytes
    stats: dict[str, Any] | None
    timed_out: bool = False
    sampled_peak_bytes: int = 0  # of the whole job, from outside, if it was sampled

    def describe(self) -> str:
        return (
            f"exit status {self.returncode}{' (timed out)' if self.timed_out else ''}\n"
            f"stdout: {self.stdout[-2000:].decode(errors='replace')}\n"
            f"stderr: {self.stderr[-4000:].decode(errors='replace')}\nstats: {self.stats}"
        )


@dataclasses.dataclass
class PlainResult:
    """What came of a command by itself."""

    returncode: int
    stdout: bytes
    stderr: bytes
    peak_rss_bytes: int
    timed_out: bool = False


def compile_c(name: str, *, flags: Sequence[str] = ()) -> Path:
    """Compile tests/safety/NAME.c, or take what an earlier run made of the same sources."""
    sources = [PROGRAMS / f"{name}.c", *sorted(PROGRAMS.glob("*.h"))]
    digest = hashlib.sha256(repr((COMPILE, tuple(flags))).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = BUILD / f"{name}-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        fresh = Path(folder) / name
        command = [*COMPILE, *flags, "-o", str(fresh), str(sources[0])]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, f"{name}.c does not compile:\n{made.stderr}"
        fresh.rename(target)
    return target


class _Reader:
    """Collects a stream in a thread, so that a full pipe never holds the writer up."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._chunks: list[bytes] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self._stream.fileno(), 1 << 16):
                self._chunks.append(chunk)

    def take(self, grace_s: float) -> bytes:
        """What there is, after waiting a moment for the end."""
        self._thread.join(grace_s)
        return b"".join(self._chunks)

    def wait_for(self, text: bytes, timeout: float) -> bool:
        """Has the text been read? Waits until it is, or until the stream ends."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            ended = not self._thread.is_alive()
            if text in b"".join(self._chunks):
                return True
            if ended:
                return False
            time.sleep(0.01)
        return False


def descendants(pid: int) -> list[int]:
    """The pid's children, theirs, and every process of the session that it leads."""
    parents: dict[int, int] = {}
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        parents[int(entry.name)] = int(fields[1])
        if int(fields[3]) == pid:
            found.append(int(entry.name))
    grown = True
    while grown:
        more = [p for p, parent in parents.items() if p not in found and parent in (pid, *found)]
        found.extend(more)
        grown = bool(more)
    return [p for p in found if p != pid]


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started, and what it started."""
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)


class Job:
    """A command that runs under `farmem run`: made by start_farmem, ended by finish."""

    def __init__(self, process: subprocess.Popen[bytes], command: list[str], folder: Path) -> None:
        self.process = process
        self.command = command
        self.folder = folder
        self.stats_path = folder / "stats.json"
        self.out = _Reader(process.stdout) if process.stdout else None
        self.err = _Reader(process.stderr) if process.stderr else None
        self.sampler: Sampler | None = None

    def job_processes(self) -> list[int]:
        """Every live process that bears the job's unmistakable folder: in its command line
        (farmem itself, its supervisor) or in its environment (what descends from them)."""
        marker = str(self.folder).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                seen = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(") ")[2][0]
            except OSError:
                continue
            if marker in seen and state not in "ZX":
                found.append(int(entry.name))
        return found

    def program(self, path: str | os.PathLike[str], timeout: float = 10) -> int:
        """The process that runs this program, once farmem has become it."""
        first = os.fsencode(path)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for pid in self.job_processes():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] == first:
                        return pid
            time.sleep(0.02)
        raise AssertionError(f"{os.fspath(path)} does not run")

    def supervisor(self, timeout: float = 10) -> int:
        """The job's supervisor: it was forked before the exec, so it kept the command line; its
        session is that of the process which forked it, and which ends at once."""
        marker = str(self.stats_path).encode()
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for pid in self.job_processes():
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if os.getsid(pid) not in (self.process.pid, pid) and marker in words:
                        return pid
            time.sleep(0.02)
        raise AssertionError("no supervisor found")

    def await_out(self, text: str, seconds: float = 90) -> None:
        """Waits until the program has printed the text; if it does not, the test has failed."""
        self._await(self.out, text, seconds)

    def await_err(self, text: str, seconds: float = 90) -> None:
        """The same of what farmem or the program says on stderr."""
        self._await(self.err, text, seconds)

    def _await(self, reader: _Reader | None, text: str, seconds: float) -> None:
        assert reader is not None
        if not reader.wait_for(text.encode(), seconds):
            raise AssertionError(f"{text!r} was not said: {self.finish(0.1).describe()}")

    def job_name(self, pid: int) -> str:
        """The name of the job's socket, from the environment of one of its programs."""
        for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if item.startswith(b"FARMEM_JOB="):
                return item.partition(b"=")[2].partition(b":")[0].decode()
        raise AssertionError("the program has no FARMEM_JOB")

    def gone(self, timeout: float) -> bool:
        """Waits until no process of the job is left."""
        end = time.monotonic() + timeout
        while self.job_processes():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def clean_up(self) -> None:
        """What a failed test left running: the supervisor has a moment to go by itself."""
        if not self.gone(3):
            for pid in self.job_processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def finish(self, timeout: float = 120, *, wait_stats_s: float = 10) -> Result:
        """Wait for the command, then for the statistics, then for the output to end."""
        timed_out = False
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            kill_tree(self.process)
        stats: dict[str, Any] | None = None
        failed = self.process.returncode in EXIT_FARMEM
        end = time.monotonic() + (0.5 if timed_out or failed else wait_stats_s)
        while time.monotonic() < end:
            if self.stats_path.exists():
                stats = json.loads(self.stats_path.read_text())
                break
            time.sleep(0.01)
        return Result(
            self.process.returncode,
            self.out.take(2) if self.out else b"",
            self.err.take(2) if self.err else b"",
            stats,
            timed_out,
            self.sampler.peak_bytes if self.sampler else 0,
        )


def farmem_environment(
    defects: Sequence[str] = (), evict: str | None = None, env: Mapping[str, str] | None = None
) -> dict[str, str]:
    merged = {**os.environ, **(env or {})}
    if defects:
        merged["FARMEM_TEST_DEFECTS"] = ",".join(defects)
    if evict is not None:
        merged["FARMEM_TEST_EVICT"] = evict
    return merged


def as_user(user: str, groups: Sequence[int]) -> list[str]:
    """Words before a command that make it another user's, without any privilege.

    setpriv, not Popen's own way: it keeps root's right to search folders until the exec, so
    that an interpreter in root's home can be started (it then finds the system's library).
    """
    entry = pwd.getpwnam(user)
    others = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
    return ["setpriv", "--reuid", str(entry.pw_uid), "--regid", str(entry.pw_gid), *others]


@contextlib.contextmanager
def start_farmem(
    cmd: Sequence[str | os.PathLike[str]],
    *,
    local: str,
    defects: Sequence[str] = (),
    evict: str | None = None,
    filters: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    user: str | None = None,
    groups: Sequence[int] | None = None,
    options: Sequence[str] = (),
    wrapper: Sequence[str] = (),
    sampled: bool = False,
    **popen: Any,
) -> Iterator[Job]:
    """Start CMD under `farmem run`; whatever of it is still there at the end is killed.

    `wrapper` is put before it all: a shell that is farmem's parent, say.  With `sampled` the job's
    memory is watched from outside; `local` is a number of bytes then.
    """
    assert FARMEM.exists(), "farmem is not built here: run `make` first"
    with tempfile.TemporaryDirectory(prefix="farmem-test-") as name:
        folder = Path(name)
        if user is not None:
            entry = pwd.getpwnam(user)
            os.chown(folder, entry.pw_uid, entry.pw_gid)
            wrapper = (*wrapper, *as_user(user, groups or ()))
        command = [*wrapper, str(FARMEM), "run", "-m", local, "--stats", str(folder / "stats.json")]
        for item in filters:
            command += ["--filter", item]
        command += [*options, "--", *(os.fspath(word) for word in cmd)]
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "env": {**farmem_environment(defects, evict, env), "FARMEM_TEST_FOLDER": name},
            "cwd": cwd,
            "start_new_session": True,
            **popen,
        }
        sampler = Sampler(name, int(local)) if sampled else None
        process = subprocess.Popen(command, **settings)
        job = Job(process, command, folder)
        job.sampler = sampler
        try:
            with sampler or contextlib.nullcontext():
                yield job
        finally:
            if process.poll() is None:
                kill_tree(process)
            job.clean_up()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()


def _feed(process: subprocess.Popen[bytes], data: bytes | None) -> None:
    if process.stdin is None:
        return
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(data or b"")
        process.stdin.close()


def run_farmem(
    cmd: Sequence[str | os.PathLike[str]],
    *,
    local: str,
    timeout: float = 120,
    defects: Sequence[str] = (),
    evict: str | None = None,
    filters: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
    user: str | None = None,
    groups: Sequence[int] | None = None,
    options: Sequence[str] = (),
    sampled: bool = False,
) -> Result:
    """Run CMD under `farmem run` to its end; with `check`, it must have ended well."""
    popen: dict[str, Any] = {} if stdin is None else {"stdin": subprocess.PIPE}
    with start_farmem(
        cmd, local=local, defects=defects, evict=evict, filters=filters, env=env, cwd=cwd,
        user=user, groups=groups, options=options, sampled=sampled, **popen,
    ) as job:  # fmt: skip
        feeder = threading.Thread(target=_feed, args=(job.process, stdin), daemon=True)
        feeder.start()
        result = job.finish(timeout)
    if result.returncode == EXIT_UNSUPPORTED and not result.timed_out:
        pytest.skip(result.stdout.decode(errors="replace").strip() or "not possible here")
    if check:
        assert result.returncode == 0 and not result.timed_out, result.describe()
        assert result.stats is not None, f"no statistics were written\n{result.describe()}"
    return result


def run_plain(
    cmd: Sequence[str | os.PathLike[str]],
    *,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
) -> PlainResult:
    """Run CMD by itself.  A small launcher measures the peak: a child of ours would be
    charged with the memory that we have ourselves, which it holds for a moment before exec."""
    with tempfile.TemporaryDirectory(prefix="farmem-test-") as folder:
        report = Path(folder) / "peak"
        process = subprocess.Popen(
            [str(compile_c("measure")), str(report), *(os.fspath(word) for word in cmd)],
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            start_new_session=True,
        )
        assert process.stdout and process.stderr
        out, err = _Reader(process.stdout), _Reader(process.stderr)
        threading.Thread(target=_feed, args=(process, stdin), daemon=True).start()
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            kill_tree(process)
        peak = int(report.read_text()) if report.exists() else 0
        result = PlainResult(process.returncode, out.take(2), err.take(2), peak, timed_out)
        process.stdout.close()
        process.stderr.close()
    if result.returncode == EXIT_UNSUPPORTED and not timed_out:
        pytest.skip(result.stdout.decode(errors="replace").strip() or "not possible here")
    if check:
        assert result.returncode == 0 and not timed_out, (
            f"{cmd} alone ended with {result.returncode}\n{result.stderr[-2000:]!r}"
        )
    return result


def assert_paged(
    stats: Mapping[str, Any] | None, min_evicted_pages: int = 1, min_fetched_pages: int = 1
) -> None:
    """Pages really went out and came back: counted, not trusted."""
    assert stats is not None, "no statistics"
    assert stats["pages_evicted"] >= min_evicted_pages, stats
    assert stats["pages_fetched"] >= min_fetched_pages, stats


def assert_ok(result: Result | PlainResult) -> None:
    """The program said of itself that every byte was right."""
    assert result.returncode == 0, result
    assert result.stdout.splitlines()[-1:] and result.stdout.splitlines()[-1].startswith(b"ok"), (
        result
    )


def assert_defect_noticed(
    cmd: Sequence[str | os.PathLike[str]],
    defect: str,
    *,
    local: str,
    timeout: float = 30,
    attempts: int = 10,
    **options: Any,
) -> Result:
    """With its fix taken out the program must fail: by a wrong byte, a death or a hang.

    A race may be won by luck, so there are a few attempts; a failure of farmem's own
    (a bad option, say) doesn't count as noticing anything.
    """
    result = None
    for _ in range(attempts):
        result = run_farmem(
            cmd, local=local, timeout=timeout, defects=[defect], check=False, **options
        )
        assert result.returncode not in EXIT_FARMEM, result.describe()
        if result.timed_out or result.returncode != 0:
            return result
    assert result is not None
    raise AssertionError(f"{defect} was not noticed in {attempts} attempts\n{result.describe()}")


def free_space_folder() -> Path:
    """A folder on a file system that can do O_DIRECT: the build folder, not /tmp."""
    BUILD.mkdir(parents=True, exist_ok=True)
    return BUILD


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """One test at a time changes something that the whole machine has (a device's mode)."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def public_copy(program: Path, folder: Path) -> Path:
    """A copy that other users can reach and run, wherever the checkout lies."""
    target = folder / program.name
    shutil.copy(program, target)
    target.chmod(0o755)
    return target
