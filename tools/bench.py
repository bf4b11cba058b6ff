"""`make bench`: what farmem costs, measured beside what it stands against, in one run.

Three questions, each answered by alternating runs (A B C A B C ...), so that a slow moment of the
machine falls on all alike; told as the median with the lowest and highest sample:

1. starting: `farmem run -- true` against `true`;
2. memory is not short: programs that fit their budget, under farmem and plain;
3. memory is short: tools/grid.c with half of its memory local, under farmem, against everything
   local and against the kernel's swap to zram and to a RAM-backed loop device (bench_swap.py).

A column that this machine can't measure is left out, and the report says which and why.  Tables go
to stdout, tables and raw samples to files in --output.  It must leave nothing behind: no process,
device, cgroup or mount.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType

from bench_report import (
    NS_PER_MS,
    Summary,
    grid_tables,
    markdown_table,
    parse_grid,
    percent_more,
    ratio,
    summarise,
    with_spread,
)
from bench_swap import (
    MIB,
    MemoryGroup,
    Unavailable,
    loop_device,
    memory_group,
    other_swap,
    swap_on,
    zram_device,
)

HERE = Path(__file__).resolve().parent
PATTERNS = ["sequential-read", "sequential-write", "random-read", "random-write", "stride-read"]
LOCAL, FARMEM, LOOP, ZRAM = "everything local", "farmem run", "swap to loop", "swap to zram, lz4"
RUN_SECONDS_MAX = 300.0

PYTHON_PROGRAM = """
import random
random.seed(1)
words = [f"{random.getrandbits(40):x}" for _ in range(400_000)]
counts = {}
for word in words:
    counts[word[:4]] = counts.get(word[:4], 0) + 1
words.sort()
print(len(counts), words[0], words[-1])
"""

Wrap = Callable[[list[str]], list[str]]


@dataclass
class Report:
    """What has been measured and said so far; written out at the end, or when stopped."""

    raw: dict[str, object] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print now, and keep for the file."""
        self.text.append(text)
        print(text + "\n", flush=True)

    def skip(self, name: str, why: str) -> None:
        """Say by name what is not measured, and why."""
        self.skipped.append(f"{name}: {why}")
        self.say(f"Left out: **{name}**: {why}.")


@dataclass(frozen=True)
class Column:
    """One way to run the grid: what to switch on around a run, and how to start it."""

    name: str
    wrap: Wrap
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def progress(text: str) -> None:
    """A line that overwrites itself on a terminal; silent elsewhere, the tables are enough."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def run_checked(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False
    )
    if done.returncode != 0:
        detail = done.stderr.strip() or "it printed nothing"
        raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}: {detail}")
    return done.stdout


def timed_ns(command: list[str]) -> float:
    """Wall time of a command without pipes: what a shell's user waits for."""
    start_ns = time.monotonic_ns()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )
    elapsed_ns = time.monotonic_ns() - start_ns
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}")
    return float(elapsed_ns)


def farmem_command() -> Path | None:
    """The farmem of the environment that this Python belongs to, or else the one on the PATH."""
    beside = Path(sys.executable).parent / "farmem"
    if beside.exists():
        return beside
    found = shutil.which("farmem")
    return Path(found) if found else None


def farmem_wrap(farmem: Path, local_bytes: int) -> Wrap:
    return lambda command: [str(farmem), "run", "-q", "--local", str(local_bytes), "--", *command]


def build_grid(folder: Path) -> Path:
    """Compile tools/grid.c if it is newer than its program."""
    source, program = HERE / "grid.c", folder / "grid"
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        raise Unavailable(f"no C compiler: {compiler} is not installed")
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    run_checked([compiler, *flags, "-o", str(program), str(source)])
    return program


def alternate(
    measures: Mapping[str, Callable[[], float]], rounds: int, what: str, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Measure each in turn, `rounds` times; a first, discarded turn warms the caches."""
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(1 - warm_ups, rounds + 1):
        for name, measure in measures.items():
            progress(f"{what}: {name}, {turn} of {rounds}")
            value = measure()
            if turn > 0:
                samples[name].append(value)
    progress("")
    return samples


def bench_start(report: Report, farmem: Path, rounds: int) -> None:
    commands = {
        "true": ["true"],
        "farmem run -- true": farmem_wrap(farmem, 1024 * MIB)(["true"]),
    }
    measures = {name: partial(timed_ns, c) for name, c in commands.items()}
    samples = alternate(measures, rounds, "starting")
    report.raw["start_ns"] = samples
    rows = [[n, with_spread(summarise(s), NS_PER_MS), str(len(s))] for n, s in samples.items()]
    report.say("## Starting\n\n" + markdown_table(["ms", "median (lowest-highest)", "runs"], rows))


def bench_fits(report: Report, farmem: Path, grid: Path, rounds: int) -> None:
    """Programs that fit: the time inside the program, and the whole command's beside it."""
    fits = farmem_wrap(farmem, 2048 * MIB)
    work = [str(grid), "random-read", "256", "400"]
    python = [sys.executable, "-c", PYTHON_PROGRAM]

    def inside_ns(command: list[str]) -> float:
        run = parse_grid(run_checked(command))
        return float(run.fill_ns + run.timed_ns)

    pairs: dict[str, tuple[Callable[[list[str]], float], list[str]]] = {
        "grid, 256 MiB, inside the program": (inside_ns, work),
        "python3, 400,000 words, the whole command": (timed_ns, python),
    }
    rows, raw = [], {}
    for name, (measure, command) in pairs.items():
        samples = alternate(
            {
                "plain": partial(measure, command),
                "farmem": partial(measure, fits(command)),
            },
            rounds,
            "fits",
        )
        raw[name] = samples
        plain, paged = summarise(samples["plain"]), summarise(samples["farmem"])
        more = percent_more(paged, plain)
        rows.append([name, with_spread(plain, NS_PER_MS), with_spread(paged, NS_PER_MS), more])
    report.raw["fits_ns"] = raw
    table = markdown_table(["ms", "plain", "farmem run -m 2G", "difference of medians"], rows)
    report.say("## A program that fits its budget\n\n" + table)


@contextlib.contextmanager
def swap_column(
    name: str, device: contextlib.AbstractContextManager[str], group: MemoryGroup
) -> Iterator[Column]:
    """A column that swaps: its device is made for the whole run and switched on for each run."""
    with device as path:
        yield Column(name, group.wrap, lambda: swap_on(path))


def add_swap_columns(
    report: Report, stack: contextlib.ExitStack, columns: list[Column], local_mib: int, mib: int
) -> None:
    try:
        if others := other_swap():
            raise Unavailable(f"swap is on already ({', '.join(others)}): switch it off first")
        group = stack.enter_context(memory_group(local_mib * MIB))
    except Unavailable as error:
        report.skip("kernel swap", str(error))
        return
    # Twice what is needed: a swap that is more than half full frees slots early, and a page that
    # was only read would then be written again.
    swap_bytes = 2 * mib * MIB
    devices = [(LOOP, loop_device), (ZRAM, zram_device)]
    for name, make in devices:
        try:
            columns.append(stack.enter_context(swap_column(name, make(swap_bytes), group)))
        except Unavailable as error:
            report.skip(name, str(error))


def bench_grid(
    report: Report, farmem: Path | None, grid: Path, rounds: int, mib: int, local_percent: int
) -> None:
    local_mib = mib * local_percent // 100
    columns = [Column(LOCAL, lambda command: command)]
    if farmem is not None:
        columns.append(Column(FARMEM, farmem_wrap(farmem, local_mib * MIB)))
    samples: dict[str, dict[str, list[float]]] = {}
    cells: dict[tuple[str, str], Summary] = {}
    with contextlib.ExitStack() as stack:
        add_swap_columns(report, stack, columns, local_mib, mib)

        def measure(column: Column, pattern: str) -> float:
            with column.around():
                text = run_checked(column.wrap([str(grid), pattern, str(mib)]))
            return parse_grid(text).access_ns

        for pattern in PATTERNS:
            measures = {c.name: partial(measure, c, pattern) for c in columns}
            # No turn to warm up: grid fills its memory before the clock starts.
            samples[pattern] = alternate(measures, rounds, pattern, warm_ups=0)
            for name, values in samples[pattern].items():
                cells[name, pattern] = summarise(values)
    report.raw["grid_access_ns"] = samples
    head = f"## The grid: {mib} MiB touched a page at a time, {local_mib} MiB local\n\n"
    report.say(head + grid_tables(PATTERNS, [c.name for c in columns], cells, LOCAL, FARMEM))
    aims = [
        f"{pattern}: {ratio(cells.get((FARMEM, pattern)), cells.get((ZRAM, pattern)))}"
        for pattern in PATTERNS[:2]
        if (FARMEM, pattern) in cells and (ZRAM, pattern) in cells
    ]
    if aims:
        report.say("Aim: sequential below 0.5x of zram's time. Here: " + ", ".join(aims) + ".")


def machine() -> dict[str, object]:
    def read(path: str) -> str:
        try:
            return Path(path).read_text().strip()
        except OSError:
            return "unknown"

    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "page_cluster": read("/proc/sys/vm/page-cluster"),
        "transparent_hugepage": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measure farmem; see tools/bench.py")
    parser.add_argument("--rounds", type=int, default=3, help="grid rounds (default 3)")
    parser.add_argument("--starts", type=int, default=15, help="start-up rounds (default 15)")
    parser.add_argument("--fits", type=int, default=7, help="fits-its-budget rounds (default 7)")
    parser.add_argument("--mib", type=int, default=512, help="size of the grid (default 512)")
    parser.add_argument("--local-percent", type=int, default=50, help="local share (default 50)")
    parser.add_argument("--output", type=Path, default=HERE.parent / "build" / "bench")
    arguments = parser.parse_args()
    for name in ("rounds", "starts", "fits"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if arguments.mib < 64:
        parser.error("--mib must be at least 64: smaller grids measure the caches")
    if not 1 <= arguments.local_percent <= 99:
        parser.error("--local-percent must lie between 1 and 99")
    if arguments.mib * arguments.local_percent // 100 < 16:
        parser.error("the local share must be at least 16 MiB: raise --mib or --local-percent")
    return arguments


def stop(number: int, _frame: FrameType | None) -> None:
    """A signal becomes an exit, so that every context manager undoes what it did."""
    raise SystemExit(128 + number)


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    report = Report()
    report.raw["machine"] = machine()
    farmem = farmem_command()
    try:
        grid = build_grid(folder)
        if farmem is None:
            report.skip(FARMEM, "no farmem beside this Python or on the PATH: run `make` first")
        else:
            bench_start(report, farmem, arguments.starts)
            bench_fits(report, farmem, grid, arguments.fits)
        bench_grid(report, farmem, grid, arguments.rounds, arguments.mib, arguments.local_percent)
    except (Unavailable, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        return 130
    finally:
        report.raw["skipped"] = report.skipped
        (folder / "bench.json").write_text(json.dumps(report.raw, indent=2) + "\n")
        (folder / "bench.md").write_text("\n\n".join(report.text) + "\n")
    print(f"Raw samples: {folder / 'bench.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
