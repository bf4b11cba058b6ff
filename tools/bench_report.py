"""Numbers to text for `make bench`: medians, spread, ratios and Markdown tables.

Pure functions only.  This module measures nothing, starts nothing and reads no files, so that
tests/unit/test_bench_tools.py can hold every line of it against known answers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NS_PER_US = 1000.0
NS_PER_MS = 1_000_000.0


@dataclass(frozen=True)
class Summary:
    """What is told of a set of samples: the middle, and how far the others lie from it."""

    median: float
    low: float
    high: float
    count: int


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


def ratio(part: Summary | None, whole: Summary | None) -> str:
    """How many times `whole` fits into `part`, or a dash where one of them was not measured."""
    if part is None or whole is None or whole.median == 0:
        return "-"
    return f"{number(part.median / whole.median)}x"


def percent_more(part: Summary, whole: Summary) -> str:
    if whole.median == 0:
        return "-"
    return f"{(part.median / whole.median - 1) * 100:+.2f} %"


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


def grid_tables(
    patterns: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], Summary],
    base: str = "everything local",
    pager: str = "farmem run",
) -> str:
    """The grid as two tables: microseconds per access, and the pager against every other column."""
    times = [
        [column]
        + [
            with_spread(cells[column, pattern], NS_PER_US) if (column, pattern) in cells else "-"
            for pattern in patterns
        ]
        for column in columns
    ]
    text = markdown_table(["us per access: median (lowest-highest)", *patterns], times)
    ratios = [
        [f"{column} / {base}"]
        + [ratio(cells.get((column, pattern)), cells.get((base, pattern))) for pattern in patterns]
        for column in columns
        if column != base
    ]
    ratios += [
        [f"{pager} / {column}"]
        + [ratio(cells.get((pager, pattern)), cells.get((column, pattern))) for pattern in patterns]
        for column in columns
        if pager in columns and column not in (base, pager)
    ]
    if ratios:
        text += "\n\n" + markdown_table(["ratio of medians", *patterns], ratios)
    return text
