"""What the engine has to say, from the job's ring of messages to the caller's stderr.

The printing is a thread's work: a full pipe blocks that thread, never the supervisor.
When the caller waits for end-of-file, the thread lets go of stderr.
"""

import contextlib
import os
import threading
import time
from collections import deque
from typing import Any

from farmem import _native

ffi, lib = _native.ffi, _native.lib

_STDERR = 2
_QUEUE_LINES_MAX = 10_000
_WRITER_GRACE_NS = 200_000_000


class Printer:
    """Writes lines to stderr from a thread of its own."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque(maxlen=_QUEUE_LINES_MAX)
        self._changed = threading.Condition()
        self._releasing = False
        self._idle = True
        threading.Thread(target=self._work, daemon=True).start()

    def say(self, text: str) -> None:
        """Print a line, soon."""
        with self._changed:
            self._lines.append(f"{text}\n".encode(errors="replace"))
            self._changed.notify_all()

    def release(self) -> None:
        """Let go of stderr once everything has been printed."""
        with self._changed:
            self._releasing = True
            self._changed.notify_all()

    def flush(self, timeout_seconds: float) -> None:
        """Wait until everything has been printed, but not for ever."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while self._lines or not self._idle:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(left)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle = True
                self._changed.notify_all()
                while not self._lines and not self._releasing:
                    self._changed.wait()
                line = self._lines.popleft() if self._lines else None
                self._idle = False
            if line is None:
                _close_stderr()
                self._releasing = False
            else:
                _write_all(line)


def _close_stderr() -> None:
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, _STDERR)
    os.close(null)


def _write_all(line: bytes) -> None:
    # The reader may have gone, or the disk may be full: nobody is left to tell.
    with contextlib.suppress(OSError):
        while line:
            try:
                line = line[os.write(_STDERR, line) :]
            except BlockingIOError:
                time.sleep(0.01)  # somebody made the caller's descriptor non-blocking


class Ring:
    """Reads the job's ring of messages."""

    def __init__(self, control: Any, least_level: int) -> None:
        self._control = control
        self._least_level = least_level
        self._next = 0
        self._stuck_since_ns = 0

    def read(self, is_last: bool = False) -> list[str]:
        """The lines that have come since the last time; the oldest may be lost.

        A writer that is killed in the middle of a message never finishes it: after a
        moment, or when this is the last look, the message is passed over.
        """
        end = lib.fm_word_read(ffi.addressof(self._control, "message_next"))
        lines: list[str] = []
        if end - self._next > lib.FM_MESSAGES_MAX:
            lost = end - self._next - lib.FM_MESSAGES_MAX
            lines.append(f"farmem: {lost} messages were lost: they came too fast")
            self._next = end - lib.FM_MESSAGES_MAX
        while self._next < end:
            message = self._control.messages[self._next % lib.FM_MESSAGES_MAX]
            sequence = ffi.addressof(message, "seq")
            if lib.fm_word_read(sequence) < self._next + 1:
                if not is_last and self._is_worth_waiting():
                    break
                self._next += 1
                continue
            self._stuck_since_ns = 0
            pid, level = message.pid, message.level
            text = ffi.string(message.text).decode(errors="replace")
            overwritten = lib.fm_word_read(sequence) != self._next + 1
            self._next += 1
            if not overwritten and level >= self._least_level:
                lines.append(f"farmem: [{pid}] {text}")
        return lines

    def _is_worth_waiting(self) -> bool:
        now_ns = time.monotonic_ns()
        self._stuck_since_ns = self._stuck_since_ns or now_ns
        return now_ns - self._stuck_since_ns < _WRITER_GRACE_NS
