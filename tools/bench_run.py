"""Starting programs for `make bench`, waiting for them, and being told to stop meanwhile.

A signal to stop never raises by itself: it is noted, and acted upon only where the benchmark waits
for a program or asks.  So no step that makes or takes away a device can be torn in two.  Every
program runs in a session of its own, so that Ctrl-C at the terminal reaches this process alone,
which then ends what it started, by pid.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import IO

STDOUT_BYTES_MAX = 64 * 1024
STDERR_BYTES_MAX = 2000
OUTPUT_SECONDS_MAX = 10.0
KILL_SECONDS_MAX = 60.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Look = Callable[[int], None]


class Stopped(Exception):
    """The benchmark was told to stop; holds the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Failed(Exception):
    """A run that can't count; the text says why, in a sentence."""


class StopFlag:
    """Notes a signal to stop, for those who ask."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._number = 0

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._number = self._number or number
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")

    def fileno(self) -> int:
        """Readable once a signal has come."""
        return self._read

    def check(self) -> None:
        if self._number:
            raise Stopped(self._number)


STOP = StopFlag()


def pause(seconds: float) -> None:
    """Sleep, unless told to stop."""
    select.select([STOP], [], [], seconds)
    STOP.check()


@dataclass(frozen=True)
class Ended:
    """What came of a program."""

    status: int
    wall_ns: int
    stdout: bytes
    digest: str
    stderr: str

    def good(self, what: str) -> Ended:
        """Itself, if the program ended well."""
        if self.status:
            how = f"was killed by signal {-self.status}" if self.status < 0 else "failed"
            detail = " ".join(self.stderr.split()) or f"exit status {self.status}, no message"
            raise Failed(f"{what} {how}: {detail}")
        return self


class Collector:
    """Reads a program's output to its end in a thread: a digest of all, and the first bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.head = b""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while chunk := os.read(self._stream.fileno(), 1 << 20):
            self._digest.update(chunk)
            if len(self.head) < STDOUT_BYTES_MAX:
                self.head += chunk[: STDOUT_BYTES_MAX - len(self.head)]

    def finish(self) -> str:
        self._thread.join(OUTPUT_SECONDS_MAX)
        if self._thread.is_alive():
            raise Failed("the program ended, but something still holds its output open")
        return self._digest.hexdigest()

    def close(self) -> None:
        self._thread.join(OUTPUT_SECONDS_MAX)
        if not self._thread.is_alive():
            self._stream.close()


class Child:
    """A program that is ended with the `with` block, if it has not ended by then."""

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str] | None = None,
        keep_output: bool = True,
    ) -> None:
        self._command = command
        self._environment = {**os.environ, **(environment or {})}
        self._keep_output = keep_output

    def __enter__(self) -> Child:
        STOP.check()
        self._stderr = tempfile.TemporaryFile()
        self._start_ns = time.monotonic_ns()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._keep_output else subprocess.DEVNULL,
            stderr=self._stderr,
            env=self._environment,
            start_new_session=True,
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        stream = self._process.stdout
        self._output = Collector(stream) if stream is not None else None
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(KILL_SECONDS_MAX)
        if self._output is not None:
            self._output.close()
        os.close(self._pidfd)
        self._stderr.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, limit_s: float, look: Look | None = None, every_s: float = 0.25) -> Ended:
        """Wait for its end, looking at it now and then; the clock stops when it has ended."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(STOP, select.POLLIN)
        end = time.monotonic() + limit_s
        while True:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise Failed(f"it was stopped after {limit_s:.0f} s")
            ready = [fd for fd, _ in poll.poll(1000 * (min(left_s, every_s) if look else left_s))]
            wall_ns = time.monotonic_ns() - self._start_ns
            if self._pidfd in ready:
                return self._ended(wall_ns)
            STOP.check()
            if look is not None:
                look(self.pid)

    def _ended(self, wall_ns: int) -> Ended:
        status = self._process.wait()
        digest = self._output.finish() if self._output else ""
        self._stderr.seek(0)
        stderr = self._stderr.read()[-STDERR_BYTES_MAX:].decode(errors="replace")
        head = self._output.head if self._output else b""
        return Ended(status, wall_ns, head, digest, stderr)
