"""The plain run: its result, and its peak of anonymous memory, which sets the budgets.

The peak is sampled from outside, over all processes of the command together, because that is what
a budget of farmem's is for: the job, not the process.  Sampling can miss a short peak; the budget
is then a little tighter than its name says, never looser.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.harness import descendants
from tests.survive.programs import Call

MIB = 1 << 20
MINIMUM_BYTES = 16 * MIB
SAMPLE_SECONDS = 0.01
PLAIN_SECONDS_MAX = 120.0


@dataclass(frozen=True)
class Plain:
    """What the plain run gave, and what it took."""

    digest: str
    peak_bytes: int
    seconds: float

    def budget_bytes(self, percent: int) -> int:
        budget = self.peak_bytes * percent // 100
        assert budget >= MINIMUM_BYTES, (
            f"{percent} % of {self.peak_bytes} is under farmem's minimum: give it a bigger input"
        )
        return budget


def anonymous_bytes(pids: Iterable[int]) -> int:
    """RssAnon of these processes together; those that have gone count nothing."""
    total = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
    return total


def run_plain_sampled(call: Call) -> Plain:
    """Run a call by itself, in a session of its own, and watch its memory."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
        stdin.write(call.stdin or b"")
        stdin.seek(0)
        start = time.monotonic()
        process = subprocess.Popen(
            call.command, stdin=stdin, stdout=stdout, start_new_session=True, env=os.environ
        )
        peak = 0
        try:
            while process.poll() is None:
                assert time.monotonic() - start < PLAIN_SECONDS_MAX, f"{call.command} is too slow"
                peak = max(peak, anonymous_bytes([process.pid, *descendants(process.pid)]))
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
            process.wait()
        seconds = time.monotonic() - start
        assert process.returncode == 0, f"{call.command} alone ended with {process.returncode}"
        stdout.seek(0)
        return Plain(call.digest(stdout.read()), peak, seconds)
