"""The programs that `make bench` runs, each with the check that its result is right.

A workload prepares its input, and runs in any place (bench_place.py) in the same way: the same
program, the same size, the same check.  It knows no place by name.  Values are raw: nanoseconds, or
requests per second.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

from bench_place import Calibration, Place
from bench_report import NS_PER_MS, NS_PER_S, NS_PER_US, Metric, parse_grid
from bench_run import Child, Ended, Failed
from bench_swap import MIB, Unavailable, run_tool

HERE = Path(__file__).resolve().parent
# Above the slowest cell seen, so that only a hang or a collapse is stopped.
RUN_SECONDS_MAX = 120.0
PATTERNS = ["sequential-read", "sequential-write", "random-read", "random-write", "stride-read"]
SORT_LINE_BYTES = 2000
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def run_in(place: Place, command: list[str], environment: dict[str, str] | None = None) -> Ended:
    """Run a command in a place to its good end."""
    look = place.look if place.look_every_s else None
    with Child(place.wrap(command), environment) as child:
        ended = child.wait(RUN_SECONDS_MAX, look, place.look_every_s)
    place.said = ended.stderr
    return ended.good("the program")


class Workload:
    """One program; `metrics` names what a run of it gives."""

    name = ""
    title = ""
    metrics: tuple[Metric, ...] = ()

    def run(self, place: Place) -> dict[str, float]:
        """Run it once, check its result, and give a value for each metric."""
        raise NotImplementedError

    def calibrate(self) -> int:
        """The peak of its anonymous memory when nothing is short, from a run of its own."""
        place = Calibration()
        self.run(place)
        return place.peak_bytes


def build_grid(folder: Path) -> Path:
    """Compile tools/grid.c if it is newer than its program."""
    source, program = HERE / "grid.c", folder / "grid"
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        raise Unavailable(f"no C compiler: {compiler} is not installed")
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    run_tool(compiler, *flags, "-o", str(program), str(source))
    return program


class Grid(Workload):
    """tools/grid.c in one pattern."""

    def __init__(self, folder: Path, mib: int, pattern: str) -> None:
        self._command = [str(build_grid(folder)), pattern, str(mib)]
        self.name = f"grid {pattern}"
        self.title = f"{mib} MiB touched a page at a time, {pattern.replace('-', ' ')}"
        self.metrics = (Metric(pattern, pattern.replace("-", " "), "us per access", NS_PER_US),)
        self._pattern = pattern
        self._mib = mib

    def calibrate(self) -> int:
        """What it touches, exactly: a sample could miss the peak of so short a run."""
        self.run(Place())
        return self._mib * MIB

    def run(self, place: Place) -> dict[str, float]:
        return {self._pattern: parse_grid(run_in(place, self._command).stdout.decode()).access_ns}


class Sort(Workload):
    """GNU sort of a file that fits its buffer; what is timed is the whole command."""

    name = "sort"

    def __init__(self, folder: Path, mib: int) -> None:
        if shutil.which("sort") is None:
            raise Unavailable("sort is not installed")
        lines = mib * MIB // SORT_LINE_BYTES
        self._input = folder / "sort-input"
        self._digest = write_lines(self._input, lines)
        self._command = ["sort", "-S", f"{3 * mib}M", "--parallel=2", str(self._input)]
        self.title = f"GNU sort of {lines:,} lines of {SORT_LINE_BYTES} bytes, two threads"
        self.metrics = (Metric("sort", "the whole command", "s", NS_PER_S),)

    def run(self, place: Place) -> dict[str, float]:
        # The input stays in the page cache, charged to nobody who is measured.
        self._input.read_bytes()
        ended = run_in(place, self._command, {"LC_ALL": "C"})
        if ended.digest != self._digest:
            raise Failed("sort: wrong bytes: the output is not the sorted input")
        return {"sort": float(ended.wall_ns)}


def write_lines(path: Path, count: int) -> str:
    """Lines in random order, and the digest of the same lines sorted by Python."""
    dice = random.Random(20240607)
    lines = []
    for _ in range(count):
        # Half of a line repeats the other half: packs to about half, as text does.
        half = dice.randbytes(SORT_LINE_BYTES // 4).hex().encode()[: SORT_LINE_BYTES // 2]
        lines.append(half + half[: SORT_LINE_BYTES - len(half) - 1] + b"\n")
    with path.open("wb") as file:
        file.writelines(lines)
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line)
    return digest.hexdigest()


class Numpy(Workload):
    """tools/bench_numpy.py; the clock is the program's own, around each operation."""

    name = "numpy"

    def __init__(self, mib: int) -> None:
        self._command = [sys.executable, str(HERE / "bench_numpy.py"), str(mib)]
        self.title = f"numpy over an array of {mib} MiB"
        self.metrics = (
            Metric("multiply", "`a *= 3`", "ms", NS_PER_MS),
            Metric("sum", "`a.sum()`", "ms", NS_PER_MS),
            Metric("stride", "`a[::512] += 1`", "ms", NS_PER_MS),
            Metric("gather", "`a[random].sum()`", "ms", NS_PER_MS),
        )

    def run(self, place: Place) -> dict[str, float]:
        ended = run_in(place, self._command, ONE_THREAD)
        return parse_numpy(ended.stdout.decode(), [metric.key for metric in self.metrics])


def parse_numpy(text: str, names: list[str]) -> dict[str, float]:
    """Read bench_numpy.py's one line; anything but a clean, correct run is an error."""
    try:
        raw = json.loads(text)
        bad = int(raw["bad"])
        times = {name: float(raw["times_ns"][name]) for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise Failed(f"not a report of bench_numpy.py: {text.strip()!r} ({error})") from error
    if bad:
        raise Failed(f"numpy: wrong bytes: {bad} elements are not what they must be")
    return times
