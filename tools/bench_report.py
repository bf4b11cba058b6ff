"""Numbers to text for `make bench`: medians, spread, ratios and Markdown tables.

Pure functions only.  This module measures nothing, starts nothing and reads no files, so that
tests/unit/test_bench_tools.py can hold every line of it against known answers.

Ratios are always of times, also where a figure is a rate: below 1 the first is the faster.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

NS_PER_US = 1000.0
NS_PER_MS = 1_000_000.0
NS_PER_S = 1_000_000_000.0


@dataclass(frozen=True)
class Metric:
    """A figure that a program gives: what it is called, and in what it is told."""

    key: str
    title: str
    unit: str
    scale: float
    more_is_better: bool = False


@dataclass(frozen=True)
class Summary:
    """What is told of a set of samples: the middle, and how far the others lie from it."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Key:
    """What a figure is of: a metric of a workload, how much was local, and in which system.

    Level 0 is said of everything local, which has no level.
    """

    metric: str
    level: int
    system: str


@dataclass
class Results:
    """Every sample of a run, and why those that are missing are."""

    samples: dict[Key, list[float]] = field(default_factory=dict)
    failures: dict[Key, list[str]] = field(default_factory=dict)

    def summary(self, key: Key) -> Summary | None:
        values = self.samples.get(key)
        return summarise(values) if values else None


@dataclass(frozen=True)
class Interval:
    """A median, and between what it lies with this much confidence."""

    median: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class GridRun:
    """One run of tools/grid.c, as it reports itself."""

    pattern: str
    accesses: int
    fill_ns: int
    timed_ns: int

    @property
    def access_ns(self) -> float:
        """Nanoseconds per access, the fill phase left out."""
        return self.timed_ns / self.accesses


def summarise(samples: Sequence[float]) -> Summary:
    if not samples:
        raise ValueError("no samples to summarise")
    return Summary(statistics.median(samples), min(samples), max(samples), len(samples))


def middle_half(samples: Sequence[float]) -> Summary:
    """The median and the quartiles: for many samples, of which the outermost say little."""
    if len(samples) < 2:
        return summarise(samples)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, low, high, len(samples))


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval:
    """Where the median lies, from the order of the samples alone: no distribution is assumed.

    The k-th lowest and the k-th highest sample enclose it unless fewer than k of n fair coins show
    the same side: the widest k that is confident enough.  With too few samples even the extremes
    are not, and the interval says how confident it is.
    """
    ordered, count = sorted(samples), len(samples)
    median = statistics.median(ordered)
    outside = 2.0 * 0.5**count
    rank = 1
    while rank < (count + 1) // 2:
        wider = outside + 2.0 * math.comb(count, rank) * 0.5**count
        if 1.0 - wider < confidence:
            break
        outside, rank = wider, rank + 1
    return Interval(median, ordered[rank - 1], ordered[-rank], 1.0 - outside)


def verdict(interval: Interval, most: float, confidence: float = 0.95) -> str:
    """Whether a figure is at most `most`, if the samples allow to say so."""
    if interval.confidence >= confidence and interval.high <= most:
        return "met"
    if interval.confidence >= confidence and interval.low > most:
        return "missed"
    return "not decided: the spread is wider than the effect"


def parse_grid(text: str) -> GridRun:
    """Read grid's one line; anything but a clean, correct run is an error, never a number."""
    try:
        raw = json.loads(text)
        run = GridRun(
            str(raw["pattern"]), int(raw["accesses"]), int(raw["fill_ns"]), int(raw["timed_ns"])
        )
        bad = int(raw["bad"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a report of grid: {text.strip()!r} ({error})") from error
    if bad:
        raise ValueError(f"grid found {bad} wrong pages in {run.pattern}")
    if run.accesses <= 0:
        raise ValueError(f"grid reports {run.accesses} accesses in {run.pattern}")
    return run


def number(value: float) -> str:
    """Three figures at most: more would claim a precision that a shared machine does not give."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    if value >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}"


def with_spread(summary: Summary, unit: float) -> str:
    """The median and, in brackets, the lowest and the highest sample, all divided by unit."""
    low, high = number(summary.low / unit), number(summary.high / unit)
    return f"{number(summary.median / unit)} ({low}-{high})"


def time_ratio(part: Summary | None, whole: Summary | None, more_is_better: bool) -> str:
    """The time of `part` as a share of that of `whole`, from times or from rates."""
    return ratio(whole, part) if more_is_better else ratio(part, whole)


def ratio(part: Summary | None, whole: Summary | None) -> str:
    """How many times `whole` fits into `part`, or a dash where one of them was not measured."""
    if part is None or whole is None or whole.median == 0:
        return "-"
    return f"{number(part.median / whole.median)}x"


def percent(share: float) -> str:
    return f"{share * 100:+.2f} %"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up, so that it reads well in a terminal too."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells under a header of {len(header)}")
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    marks = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join([line(header), line(marks), *(line(row) for row in rows)])


def cell_text(results: Results, key: Key, scale: float) -> str:
    """A figure with its spread, and how many runs failed; a dash where nothing was tried."""
    summary, failures = results.summary(key), results.failures.get(key, [])
    if summary is None:
        return f"failed ({len(failures)} of {len(failures)})" if failures else "-"
    text = with_spread(summary, scale)
    if failures:
        text += f", {len(failures)} of {len(failures) + summary.count} failed"
    return text


def workload_table(
    results: Results,
    metrics: Sequence[tuple[str, Metric]],
    levels: Sequence[int],
    systems: Sequence[str],
    base: str,
    pager: str,
) -> str:
    """One row for each metric and level: every system's figure, then the pager's time as a share
    of each other's."""
    others = [name for name in systems if name not in (base, pager)]
    rivals = others if pager in systems else []
    header = ["", "local", *systems, *(f"{pager} : {name}" for name in rivals)]
    rows = []
    for name, metric in metrics:
        for level in levels:
            keys = {s: Key(name, 0 if s == base else level, s) for s in systems}
            row = [f"{metric.title}, {metric.unit}", f"{level} %"]
            row += [cell_text(results, keys[s], metric.scale) for s in systems]
            mine = results.summary(keys[pager]) if rivals else None
            for rival in rivals:
                theirs = results.summary(keys[rival])
                row.append(time_ratio(mine, theirs, metric.more_is_better))
            rows.append(row)
    return markdown_table(header, rows)


def overview_table(
    results: Results,
    metrics: Sequence[tuple[str, Metric]],
    levels: Sequence[int],
    pager: str,
    rival: str,
) -> str:
    """The pager's time as a share of one rival's, for every metric and level."""
    rows = []
    for name, metric in metrics:
        shares = [
            time_ratio(
                results.summary(Key(name, level, pager)),
                results.summary(Key(name, level, rival)),
                metric.more_is_better,
            )
            for level in levels
        ]
        rows.append([f"{name.partition('/')[0].partition(' ')[0]}: {metric.title}", *shares])
    header = [f"{pager} : {rival}", *(f"{level} % local" for level in levels)]
    return markdown_table(header, rows)


def failure_lines(results: Results) -> list[str]:
    """Each reason once, with how often it was met."""
    lines = []
    for key, reasons in results.failures.items():
        where = f"{key.metric.partition('/')[0]}, {key.system}"
        where += f", {key.level} % local" if key.level else ""
        for reason in dict.fromkeys(reasons):
            count = reasons.count(reason)
            lines.append(f"- {where}: {reason}" + (f" ({count} times)" if count > 1 else ""))
    return list(dict.fromkeys(lines))
