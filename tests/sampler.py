"""The anonymous memory of a whole job, sampled from outside while it runs.

Every few milliseconds, over all processes whose environment bears the job's mark, and their
children.  What a fork shares counts in each of them by the cheap figure (statm), so where that is
beyond the budget the kernel is asked for the exact one (Pss_Anon).  The command line that becomes
the command, and the supervisor, are not the job's memory and are left out.  Nothing of farmem's own
is read or trusted.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

PAUSE_SECONDS = 0.002
# A process shows the environment of whoever forked it until it has executed its program.
SETTLED_SECONDS = 0.5
PAGE_BYTES = 4096
OURS = ("farmem", "farmem-job")


class Member:
    """A process of the job; its memory, read through a file that stays open."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.counts = False
        self._statm = os.open(f"/proc/{pid}/statm", os.O_RDONLY)

    def anonymous_bytes(self) -> int:
        """Resident less shared; OSError or ValueError when it has gone."""
        if not self.counts:
            self.counts = Path(f"/proc/{self.pid}/comm").read_text().strip() not in OURS
            if not self.counts:
                return 0
        words = os.pread(self._statm, 200, 0).split()
        return (int(words[1]) - int(words[2])) * PAGE_BYTES

    def private_bytes(self) -> int:
        """The same, with what is shared divided by those who share it."""
        if self.counts:
            for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss_Anon:"):
                    return int(line.split()[1]) * 1024
        return 0

    def close(self) -> None:
        os.close(self._statm)


class Sampler:
    """Watches the job that bears `mark` in its environment, as a context, from a thread.

    Make it before the job is started.
    """

    def __init__(self, mark: str, budget_bytes: int) -> None:
        self.now_bytes = self.peak_bytes = 0
        self.samples = 0
        self.longest_gap_seconds = 0.0
        self._mark = mark.encode()
        self._budget_bytes = budget_bytes
        # What runs already is none of the job's.
        self._first_seen = {int(name): 0.0 for name in os.listdir("/proc") if name.isdigit()}
        self._members: dict[int, Member] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        for member in self._members.values():
            member.close()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._done.wait(PAUSE_SECONDS):
            now = time.monotonic()
            self.longest_gap_seconds = max(self.longest_gap_seconds, now - last)
            last = now
            self._find_members(now)
            self.now_bytes = self._sample()
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)
            self.samples += 1

    def add(self, pid: int) -> None:
        """For a daemon that hides all that would tell of whose job it is."""
        with contextlib.suppress(OSError):
            self._members.setdefault(pid, Member(pid))

    def _find_members(self, now: float) -> None:
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) in self._members:
                continue
            pid = int(name)
            if now - self._first_seen.setdefault(pid, now) > SETTLED_SECONDS:
                continue
            with contextlib.suppress(OSError):
                if self._is_ours(pid):
                    self._members[pid] = Member(pid)

    def _is_ours(self, pid: int) -> bool:
        """By its parent as well: a program may overwrite its environment (Redis does)."""
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1]
        if int(parent) in self._members:
            return True
        return self._mark in Path(f"/proc/{pid}/environ").read_bytes()

    def _sample(self) -> int:
        total = self._sum(Member.anonymous_bytes)
        if total <= self._budget_bytes:
            return total
        return min(total, self._sum(Member.private_bytes))

    def _sum(self, of: Callable[[Member], int]) -> int:
        total = 0
        for pid, member in list(self._members.items()):
            try:
                total += of(member)
            except (OSError, IndexError, ValueError):
                member.close()
                del self._members[pid]
        return total
