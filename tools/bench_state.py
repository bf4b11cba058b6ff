"""What `make bench` was asked for and what it has found so far: the books of one run.

Keeps and counts; starts no program by itself, and writes nothing but progress.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench_fits import FitsRow, Pair
from bench_place import FARMEM, LOCAL, LOOP, PAGE_BYTES, ZRAM, Systems
from bench_report import Key, Results
from bench_run import Failed
from bench_swap import Unavailable
from bench_work import PATTERNS, Workload

PARTS = ["start", "fits", "grid", "sort", "numpy", "redis"]
SYSTEMS = [FARMEM, ZRAM, LOOP]
LEVELS = [100, 75, 50, 25, 10]
APPLICATION_MIB_MIN = 48
# Seconds of one run at the default size: with everything local, and what is added (times the share
# that does not fit) in each system; from the processor time of runs on two processors.
RUN_SECONDS = {
    "grid": {LOCAL: 0.4, FARMEM: 2.8, ZRAM: 5.5, LOOP: 6.0},
    "sort": {LOCAL: 0.5, FARMEM: 6.0, ZRAM: 7.0, LOOP: 8.0},
    "numpy": {LOCAL: 0.7, FARMEM: 2.2, ZRAM: 5.0, LOOP: 4.5},
    "redis": {LOCAL: 2.5, FARMEM: 8.0, ZRAM: 6.5, LOOP: 9.0},
}


@dataclass
class Settings:
    """What was asked for."""

    parts: list[str]
    systems: list[str]
    levels: list[int]
    rounds: int
    mib: int
    starts: int
    fits_seconds: float
    minutes: float
    quick: bool
    output: Path
    docs: bool

    @property
    def application_mib(self) -> int:
        """Smaller than the grid, because real programs take longer to be paged."""
        return max(APPLICATION_MIB_MIN, self.mib * 3 // 8)

    def smallest_mib(self) -> int:
        """What the smallest of the programs needs, about."""
        only_grid = not {"sort", "numpy", "redis"} & set(self.parts)
        return self.mib if only_grid else min(self.mib, self.application_mib * 95 // 100)

    def estimate_seconds(self) -> float:
        """How long it will take on a quiet machine."""
        total = 0.3 * self.starts * ("start" in self.parts)
        total += 4 * (self.fits_seconds + 3) * ("fits" in self.parts)
        return total + self.rounds * sum(self.round_seconds(part) for part in self.parts)

    def round_seconds(self, part: str) -> float:
        seconds = RUN_SECONDS.get(part)
        if seconds is None:
            return 0.0
        size = self.mib / 512 if part == "grid" else self.application_mib / 192
        runs = [(LOCAL, 0.0)] + [(s, 1 - n / 100) for s in self.systems for n in self.levels]
        total = sum(seconds[LOCAL] + 0.3 + seconds[s] * short for s, short in runs)
        return size * total * (len(PATTERNS) if part == "grid" else 1)


FULL = Settings(
    parts=PARTS,
    systems=SYSTEMS,
    levels=LEVELS,
    rounds=3,
    mib=512,
    starts=40,
    fits_seconds=20.0,
    minutes=25.0,
    quick=False,
    output=Path(__file__).resolve().parent.parent / "build" / "bench",
    docs=False,
)
QUICK = replace(FULL, quick=True, levels=[50], rounds=1, mib=128, starts=3, fits_seconds=1.0)


def say(text: str) -> None:
    """Progress, on stderr; a terminal that has gone is no reason to stop."""
    with contextlib.suppress(OSError):
        print(f"bench: {text}", file=sys.stderr, flush=True)


@dataclass
class Bench:
    """A run of the benchmark: what it has found so far."""

    settings: Settings
    results: Results = field(default_factory=Results)
    runs: list[dict[str, object]] = field(default_factory=list)
    workloads: list[Workload] = field(default_factory=list)
    need_bytes: dict[str, int] = field(default_factory=dict)
    packed: dict[str, tuple[int, int]] = field(default_factory=dict)
    fits: list[FitsRow] = field(default_factory=list)
    starts: list[Pair] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rounds_done: int = 0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def measure(self, work: Workload, level: int, name: str, systems: Systems, turn: int) -> None:
        """One run of one program in one place."""
        need_bytes = self.need_bytes[work.name]
        local_bytes = need_bytes * level // 100
        run: dict[str, object] = {"workload": work.name, "level": level, "system": name}
        run |= {"round": turn, "local_bytes": local_bytes}
        place = None
        try:
            with systems.make[name](local_bytes) as place:
                values = work.run(place)
                counts = place.finish()
            if name != LOCAL:
                counts.must_have_paged((need_bytes - local_bytes) // PAGE_BYTES)
            run |= {"values": values, "counts": asdict(counts)}
        except (Failed, Unavailable, OSError, ValueError) as error:
            said = " ".join(place.said.split()) if place else ""
            is_new = said and said not in str(error)
            reason = f"{error}; it said: {said}" if is_new else str(error)
            say(f"{work.name}, {name}, {level} %: {reason}")
            run["failed"] = reason
            for metric in work.metrics:
                key = Key(f"{work.name}/{metric.key}", level, name)
                self.results.failures.setdefault(key, []).append(reason)
        else:
            for metric_key, value in values.items():
                key = Key(f"{work.name}/{metric_key}", level, name)
                self.results.samples.setdefault(key, []).append(value)
            if counts.zram.given_bytes > self.packed.get(work.name, (0, 0))[0]:
                self.packed[work.name] = (counts.zram.given_bytes, counts.zram.taken_bytes)
        self.runs.append(run)

    def failed_runs(self) -> int:
        return sum("failed" in run for run in self.runs) + len(self.failures)
