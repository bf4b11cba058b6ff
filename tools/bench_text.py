"""The report of `make bench`: what was found, put together as one page of Markdown.

Measures nothing.  The page says first what speaks against its own figures, then the figures, then
how they were come by, so that it can be read alone; docs/benchmarks.md is such a page.
"""

from __future__ import annotations

from bench_fits import fits_table, start_table
from bench_machine import Noise
from bench_place import FARMEM, LOCAL, LOOP, TITLES, ZRAM
from bench_report import (
    Key,
    Metric,
    clock,
    failure_lines,
    overview_table,
    ratio,
    workload_table,
)
from bench_state import Bench
from bench_swap import MIB
from bench_work import Workload

SEQUENTIAL_AIM = 0.5

HOW = """\
All in one run. In each round every program is run at every level by every system in turn, the
systems taking turns at going first, so that a slow moment of the machine falls on all alike.
Figures are the median of the rounds, with the lowest and the highest in brackets; ratios are of
medians, and always of times: **below 1 farmem is the faster**.

- **Local memory.** What a program needs is the peak of its anonymous memory with everything
  local, sampled from outside (for the grid: what it touches). A level is that many percent of it,
  the same number of bytes for all: the budget of `farmem run -m`, and the limit of the memory
  cgroup. A cgroup counts a little more against it than farmem does: page tables, other kernel
  memory and file pages that its members are the first to read. Input files and the outputs'
  readers are outside.
- **Everything local** is the same program by itself; it is shown beside each level, and has none.
- **zram** compresses what it holds, with lz4; `mem:` and the loop device don't. All three keep
  the pages in this host's memory, so this compares the ways there, and saves no memory but what
  zram packs. An uncompressed kernel swap without a block layer would lie between the two.
- **The loop device** lies over a file in a tmpfs whose pages were allocated before, outside the
  cgroup.
- **Checked in every run:** the result (every page, line, element or key that the program had to
  have); that pages really went out and came back (farmem's counters, the kernel's pswpout and
  pswpin); that farmem held no more than its budget and 16 MiB. A run that fails any of it is
  counted as failed and gives no figure.
- **What is timed.** The grid and numpy: inside the program, after its memory has been filled.
  sort: the whole command, farmem's start included. redis: what redis-benchmark says, its clients
  outside; filling and checking are not timed.
- **The grid goes over its memory once**, so half of its pages leave for the first time while the
  clock runs, and `mem:` and zram take memory for them that nobody has touched before. On a
  virtual machine that can cost more than all the rest (here 6 us a page, a fifth of all processor
  time: the hypervisor finds the memory then). The loop device's was taken before. Later passes are
  faster: `grid sequential-read 512 3` tells by how much.
- While a swap run goes, the cgroup's `memory.stat` is read 200 times a second. Without that Linux
  6.18 was seen to kill programs in a cgroup for want of memory with most of the swap free, in
  about half of the runs; with it, hardly ever: reading brings the group's counters up to date, by
  which the kernel reclaims.
- Starting and programs that fit: pairs of runs, in turn the other way round; median and
  quartiles. The difference is the median of the pairs' differences, with its 95 % confidence
  interval (from their order alone)."""


def title_of_part(work: Workload) -> str:
    return work.name.partition(" ")[0]


def metrics_of(works: list[Workload]) -> list[tuple[str, Metric]]:
    return [(f"{work.name}/{metric.key}", metric) for work in works for metric in work.metrics]


def machine_section(facts: dict[str, str], noise: Noise, bench: Bench) -> str:
    told = facts | noise.facts() | {"took": f"{clock(bench.elapsed())} minutes"}
    return "## The machine\n\n" + "\n".join(f"- {key}: {value}" for key, value in told.items())


def warnings_section(bench: Bench, noise: Noise, stopped: str) -> str:
    lines = [f"- {text}" for text in noise.warnings()]
    if lines:
        lines.insert(0, "**The machine was busy: read ratios, and those with care.**\n")
    notes = []
    if stopped:
        notes.append(
            f"**Not finished: {stopped}.** What follows is what had been measured by then."
        )
    if bench.settings.quick:
        notes.append("**A quick run:** it shows that everything works; its figures mean little.")
    return "\n\n".join(["\n".join(lines), *notes] if lines else notes)


def grid_aims(bench: Bench) -> str:
    """The aim for sequential access at half of the memory, from the figures."""
    found = []
    for pattern in ("sequential-read", "sequential-write"):
        name = f"grid {pattern}/{pattern}"
        mine, theirs = (bench.results.summary(Key(name, 50, s)) for s in (FARMEM, ZRAM))
        if mine and theirs:
            met = "met" if mine.median <= SEQUENTIAL_AIM * theirs.median else "missed"
            found.append(f"{pattern} {ratio(mine, theirs)} ({met})")
    if not found:
        return ""
    return f"Aim at 50 % local: at most {SEQUENTIAL_AIM}x of zram's time. Here: {', '.join(found)}."


def overview_section(bench: Bench) -> str:
    metrics, tables = metrics_of(bench.workloads), []
    for rival in (ZRAM, LOOP):
        if {FARMEM, rival} <= set(bench.settings.systems) and metrics:
            levels = bench.settings.levels
            tables.append(overview_table(bench.results, metrics, levels, FARMEM, rival))
    if not tables:
        return ""
    head = "## In short: farmem's time as a share of the kernel's\n"
    return "\n\n".join([head.rstrip(), *tables, *filter(None, [grid_aims(bench)])])


def workload_section(bench: Bench, works: list[Workload]) -> str:
    settings = bench.settings
    systems = [LOCAL, *settings.systems]
    table = workload_table(
        bench.results, metrics_of(works), settings.levels, systems, LOCAL, FARMEM
    )
    lines = [f"## {title_of_part(works[0])}", ""]
    for work in works:
        need = bench.need_bytes.get(work.name, 0) / MIB
        line = f"- {work.title}; needs {need:.0f} MiB"
        given, taken = bench.packed.get(work.name, (0, 0))
        if given:
            line += f"; zram packed its pages to {taken / given:.0%}"
        lines.append(line + ".")
    return "\n".join([*lines, "", table])


def enough_sections(bench: Bench) -> list[str]:
    sections = []
    if bench.starts:
        sections.append("## Starting\n\n" + start_table(bench.starts))
    if bench.fits:
        sections.append("## A program that fits its budget\n\n" + fits_table(bench.fits))
    return sections


def missing_section(bench: Bench) -> str:
    lines = [f"- left out: {text}" for text in bench.left_out]
    lines += [f"- failed: {text}" for text in bench.failures]
    lines += failure_lines(bench.results)
    return "## Left out and failed\n\n" + "\n".join(lines) if lines else ""


def report(bench: Bench, facts: dict[str, str], noise: Noise, stopped: str) -> str:
    """The whole page."""
    settings = bench.settings
    rounds = f"{bench.rounds_done} round{'s' if bench.rounds_done != 1 else ''}"
    names = "; ".join(f"*{name}*: {TITLES[name]}" for name in settings.systems)
    head = f"# Benchmarks\n\nWritten by `make bench`; {rounds}. {names}."
    parts: dict[str, list[Workload]] = {}
    for work in bench.workloads:
        parts.setdefault(title_of_part(work), []).append(work)
    sections = [
        head,
        warnings_section(bench, noise, stopped),
        machine_section(facts, noise, bench),
        overview_section(bench),
        *enough_sections(bench),
        *(workload_section(bench, works) for works in parts.values()),
        missing_section(bench),
        "## How it was measured\n\n" + HOW,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
