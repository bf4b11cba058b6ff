"""What `make bench` asks when memory is not short: starting, and programs that fit their budget.

The effect looked for is about one part in a hundred, so runs come in pairs, the two of a pair
beside each other and in turn the other way round, and what is told is the median of the pairs'
differences and where it lies with 95 % confidence.  Pairs are added until that is narrow enough or
time is up: by the width alone, never by what the figure says.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench_place import Counts, Place
from bench_report import (
    NS_PER_MS,
    Interval,
    markdown_table,
    median_interval,
    middle_half,
    parse_grid,
    percent,
    verdict,
    with_spread,
)
from bench_run import Failed
from bench_swap import MIB
from bench_work import Workload, build_grid, run_in

START_AIM_NS = 150 * NS_PER_MS
FITS_AIM = 0.01
WIDTH_MAX = 0.005
CONFIDENCE = 0.95
PAIRS_MIN = 10
PAIRS_MAX = 200
# A quarter to spare, where farmem does nothing; and so little that it has taken the program over.
SHARES_PERCENT = (125, 105)

PYTHON_PROGRAM = """
import json, random, time
start = time.monotonic_ns()
random.seed(1)
words = [f"{random.getrandbits(40):x}" for _ in range(300_000)]
counts = {}
for word in words:
    counts[word[:4]] = counts.get(word[:4], 0) + 1
words.sort()
took = time.monotonic_ns() - start
print(json.dumps({"took_ns": took, "result": [len(counts), words[0], words[-1]]}))
"""
PYTHON_RESULT = [60967, "10001f80a3", "ffffee57bb"]

MakePlace = Callable[[int], AbstractContextManager[Place]]
Pair = tuple[float, float]


@dataclass(frozen=True)
class FitsRow:
    """One program in one budget: its pairs, and how many pages were moved out nevertheless."""

    title: str
    share_percent: int
    pairs: list[Pair]
    pages_out: int

    def interval(self) -> Interval:
        return median_interval([paged / plain - 1 for plain, paged in self.pairs])


class GridFits(Workload):
    """tools/grid.c, many passes over memory that is there: what it takes inside."""

    name = "grid, 256 MiB"

    def __init__(self, folder: Path) -> None:
        self._command = [str(build_grid(folder)), "random-read", "256", "300"]

    def calibrate(self) -> int:
        return 256 * MIB

    def run(self, place: Place) -> dict[str, float]:
        run = parse_grid(run_in(place, self._command).stdout.decode())
        return {"inside": float(run.fill_ns + run.timed_ns)}


class PythonFits(Workload):
    """Python's own memory: many small objects, a dictionary, a sort; what it takes inside."""

    name = "python3, 300,000 words"

    def run(self, place: Place) -> dict[str, float]:
        ended = run_in(place, [sys.executable, "-c", PYTHON_PROGRAM])
        said = json.loads(ended.stdout)
        if said["result"] != PYTHON_RESULT:
            raise Failed(f"python3: wrong result: {said['result']}")
        return {"inside": float(said["took_ns"])}


def narrow_enough(pairs: list[Pair]) -> bool:
    interval = median_interval([paged / plain - 1 for plain, paged in pairs])
    return interval.confidence >= CONFIDENCE and (interval.high - interval.low) / 2 <= WIDTH_MAX


def measure_pairs(
    plain: Callable[[], float], paged: Callable[[], float], seconds: float, least: int = PAIRS_MIN
) -> list[Pair]:
    """Pairs, until their median is known well enough; one to warm up is thrown away."""
    plain(), paged()
    pairs: list[Pair] = []
    end = time.monotonic() + seconds
    while len(pairs) < least or (
        len(pairs) < PAIRS_MAX and time.monotonic() < end and not narrow_enough(pairs)
    ):
        if len(pairs) % 2:
            second = paged()
            pairs.append((plain(), second))
        else:
            first = plain()
            pairs.append((first, paged()))
    return pairs


def measure_fits(
    work: Workload, share_percent: int, make: MakePlace, seconds: float, least: int
) -> FitsRow:
    """One program, plain and under farmem with a budget of this share of its need."""
    budget_bytes = work.calibrate() * share_percent // 100
    pages_out = 0

    def paged() -> float:
        nonlocal pages_out
        with make(budget_bytes) as place:
            value = work.run(place)["inside"]
            pages_out = max(pages_out, place.finish().pages_out)
        return value

    pairs = measure_pairs(lambda: work.run(Place())["inside"], paged, seconds, least)
    return FitsRow(work.name, share_percent, pairs, pages_out)


def fits_table(rows: list[FitsRow]) -> str:
    header = ["inside the program, ms", "budget", "pairs", "plain", "under farmem"]
    header += ["difference (between, confidence)", f"aim: at most {FITS_AIM * 100:.0f} %"]
    header += ["pages evicted"]
    lines = []
    for row in rows:
        plain, paged = ([pair[i] for pair in row.pairs] for i in (0, 1))
        interval = row.interval()
        lines.append(
            [
                row.title,
                f"{row.share_percent} % of its need",
                str(len(row.pairs)),
                with_spread(middle_half(plain), NS_PER_MS),
                with_spread(middle_half(paged), NS_PER_MS),
                f"{percent(interval.median)} ({percent(interval.low)} .. "
                f"{percent(interval.high)}, {interval.confidence:.0%})",
                verdict(interval, FITS_AIM),
                str(row.pages_out),
            ]
        )
    return markdown_table(header, lines)


def measure_start(make: MakePlace, rounds: int) -> list[Pair]:
    """Pairs of `true` and `farmem run -- true`, the whole command's time."""

    def paged() -> float:
        with make(1024 * MIB) as place:
            value = run_in(place, ["true"]).wall_ns
            counts: Counts = place.finish()
            if counts.pages_out:
                raise Failed("`true` was paged: what was measured is not starting alone")
        return float(value)

    return measure_pairs(lambda: float(run_in(Place(), ["true"]).wall_ns), paged, 0.0, rounds)


def start_table(pairs: list[Pair]) -> str:
    rows = []
    for i, name in enumerate(("`true`", "`farmem run -- true`")):
        values = [pair[i] for pair in pairs]
        rows.append([name, with_spread(middle_half(values), NS_PER_MS), str(len(values)), ""])
    rows[1][3] = verdict(median_interval([pair[1] for pair in pairs]), START_AIM_NS)
    aim = f"aim: at most {START_AIM_NS / NS_PER_MS:.0f} ms"
    return markdown_table(["the whole command, ms", "time", "runs", aim], rows)
