"""A budget that is changed while a program runs, measured and drawn: docs/budget.svg.

Runs tests/safety/endless.c (it uses all its memory, and checks every word that it meets) under
`farmem run`, changes its budget with `farmem set`, and samples meanwhile: RssAnon of the program
from /proc every few milliseconds, the budget and what is in the pool from the job's supervisor.
Writes a plot (plain SVG) and prints what each change did, in Markdown.  Ends with exit status 1
if the program found a wrong word.  Starts nothing that it does not end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_report import markdown_table
from demo_watch import anonymous_bytes

from farmem.running import status_of

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "safety" / "endless.c"
MIB = 1 << 20
START_MIB = 160
STEPS_MIB = (40, 96, 24, 128, 16, 112, 32, 80)
BOUND_BYTES = 16 * MIB
STEP_SECONDS = 1.5
LOCAL_SECONDS = 0.003
STATUS_SECONDS = 0.015
END_SECONDS_MAX = 60.0

Points = list[tuple[float, int]]


@dataclass
class Samples:
    """What was seen, and when: seconds since the first sample, bytes."""

    local: Points
    budget: Points
    remote: Points


@dataclass(frozen=True)
class Change:
    """What one change of the budget did."""

    seconds: float
    before_bytes: int
    budget_bytes: int
    # Until local memory was within the budget + 16 MiB, and within the budget; None: never.
    bound_seconds: float | None
    budget_seconds: float | None
    # The most that was local after that, up to the next change.
    peak_bytes: int


def changes_of(samples: Samples) -> list[Change]:
    """The changes of the budget, as the samples show them.

    A change came some time after the last sample of the old budget: it is counted from there,
    so it may have taken less time than is said, never more.
    """
    found: list[Change] = []
    steps = [
        (at, earlier, later)
        for (at, earlier), (_, later) in zip(samples.budget, samples.budget[1:], strict=False)
        if earlier != later
    ]
    ends = [at for at, _, _ in steps[1:]] + [float("inf")]
    for (at, before, budget), end in zip(steps, ends, strict=True):
        mine = [(when, size) for when, size in samples.local if at < when < end]

        def since(limit: int, mine: Points = mine, at: float = at) -> float | None:
            return next((when - at for when, size in mine if size <= limit), None)

        settled = since(budget)
        later = [size for when, size in mine if when - at >= (settled or 0.0)]
        bound = since(budget + BOUND_BYTES)
        found.append(Change(at, before, budget, bound, settled, max(later, default=0)))
    return found


def _milliseconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds * 1000:.0f} ms"


def table(changes: Sequence[Change]) -> str:
    """The changes, for the documentation."""
    header = [
        "at",
        "budget",
        "within budget + 16 MiB after",
        "within budget after",
        "most after that",
    ]
    rows = [
        [
            f"{change.seconds:.2f} s",
            f"{change.before_bytes / MIB:.0f} -> {change.budget_bytes / MIB:.0f} MiB",
            *(
                _milliseconds(seconds) if change.budget_bytes < change.before_bytes else "(raised)"
                for seconds in (change.bound_seconds, change.budget_seconds)
            ),
            f"{change.peak_bytes / MIB:.1f} MiB",
        ]
        for change in changes
    ]
    return markdown_table(header, rows)


# ---- the plot --------------------------------------------------------------------------------

WIDTH, HEIGHT = 960, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 56, 48
LINES = (
    ("budget + 16 MiB", "#b0b0b0", "1", "5 4"),
    ("budget", "#202020", "1.5", ""),
    ("only in the pool", "#e08a1e", "1.5", ""),
    ("local memory (RssAnon, seen from outside)", "#1f6fb2", "2", ""),
)


def _stairs(points: Points, end: float) -> Points:
    """A value that holds until the next."""
    corners: Points = []
    for (at, size), (until, _) in zip(points, [*points[1:], (end, 0)], strict=True):
        corners += [(at, size), (until, size)]
    return corners


def thinned(points: Points) -> Points:
    """Without the points that lie between two of the same size: the line is the same."""
    kept = [
        point
        for earlier, point, later in zip(points, points[1:], points[2:], strict=False)
        if not earlier[1] == point[1] == later[1]
    ]
    return [*points[:1], *kept, *points[1:][-1:]]


class Plot:
    """Places on the picture."""

    def __init__(self, seconds: float, size_bytes: int) -> None:
        self.seconds = seconds
        self.size_bytes = size_bytes

    def x(self, seconds: float) -> float:
        """From the left."""
        return LEFT + seconds / self.seconds * (WIDTH - LEFT - RIGHT)

    def y(self, size_bytes: float) -> float:
        """From the top."""
        return HEIGHT - BOTTOM - size_bytes / self.size_bytes * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Points, colour: str, width: str, dashes: str) -> str:
        """A line through the points."""
        places = " ".join(f"{self.x(at):.1f},{self.y(size):.1f}" for at, size in thinned(points))
        style = f'stroke="{colour}" stroke-width="{width}"'
        style += f' stroke-dasharray="{dashes}"' if dashes else ""
        return f'<polyline fill="none" {style} points="{places}"/>'

    def axes(self) -> list[str]:
        """Grid lines every 32 MiB and every second, with their figures."""
        parts = []
        for mib in range(0, int(self.size_bytes / MIB) + 1, 32):
            y = self.y(mib * MIB)
            line = f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"'
            parts.append(f'{line} stroke="#e4e4e4"/>')
            parts.append(_text(LEFT - 8, y + 4, f"{mib} MiB", "end"))
        for second in range(int(self.seconds) + 1):
            parts.append(_text(self.x(second), HEIGHT - BOTTOM + 20, f"{second} s", "middle"))
        return parts


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def svg_of(samples: Samples, title: str) -> str:
    """The picture."""
    end = max(at for at, _ in samples.local)
    budgets = [(at, size) for at, size in samples.budget if at <= end]
    bound = [(at, size + BOUND_BYTES) for at, size in budgets]
    remote = [(at, size) for at, size in samples.remote if at <= end]
    most = max(size for _, size in [*bound, *samples.local, *remote])
    plot = Plot(end, most)
    curves = [_stairs(bound, end), _stairs(budgets, end), remote, samples.local]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="#333">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{title}</text>',
        *plot.axes(),
    ]
    x = float(LEFT)
    for curve, (name, colour, width, dashes) in zip(curves, LINES, strict=True):
        parts.append(plot.line(curve, colour, width, dashes))
        mark = f'<line x1="{x:.0f}" y1="36" x2="{x + 20:.0f}" y2="36" stroke="{colour}"'
        parts.append(f'{mark} stroke-width="2" stroke-dasharray="{dashes or "none"}"/>')
        parts.append(_text(x + 26, 40, name))
        x += 50 + 7 * len(name)
    return "\n".join([*parts, "</svg>", ""])


# ---- the run -----------------------------------------------------------------------------------


class Sampler:
    """Samples in two threads: what is local comes from the kernel, the rest from farmem."""

    def __init__(self, pid: int) -> None:
        self.samples = Samples([], [], [])
        self._pid = pid
        self._begin = time.monotonic()
        self._done = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._local, self._status)]
        for thread in self._threads:
            thread.start()

    def _local(self) -> None:
        while not self._done.wait(LOCAL_SECONDS):
            size_bytes = anonymous_bytes(self._pid)
            self.samples.local.append((time.monotonic() - self._begin, size_bytes))

    def _status(self) -> None:
        while not self._done.wait(STATUS_SECONDS):
            status = status_of(self._pid)
            seconds = time.monotonic() - self._begin
            self.samples.budget.append((seconds, status["budget_bytes"]))
            self.samples.remote.append((seconds, status["remote_bytes"]))

    def end(self) -> Samples:
        """Stop; everything that was seen."""
        self._done.set()
        for thread in self._threads:
            thread.join()
        return self.samples


def run(folder: Path, farmem: str) -> Samples:
    """Start the program, change its budget, end it, and believe nothing but its last word."""
    program, stop = folder / "endless", folder / "stop"
    compiler = ["cc", "-std=gnu11", "-D_GNU_SOURCE", "-O2", "-pthread"]
    subprocess.run([*compiler, "-o", str(program), str(PROGRAM)], check=True)
    command = [farmem, "run", "-m", f"{START_MIB}M", "--", str(program), str(stop)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit("plot_budget: the program did not start")
        sampler = Sampler(process.pid)
        time.sleep(STEP_SECONDS)
        for mib in STEPS_MIB:
            setting = [farmem, "set", str(process.pid), f"local={mib}M"]
            subprocess.run(setting, check=True, stdout=subprocess.DEVNULL)
            time.sleep(STEP_SECONDS)
        samples = sampler.end()
        stop.touch()
        word = process.stdout.readline()
        if process.wait(END_SECONDS_MAX) != 0 or word != "ok\n":
            raise SystemExit(f"plot_budget: the program ended with {process.returncode}, {word!r}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return samples


def machine() -> str:
    """What it was measured on, as far as the kernel says."""
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{os.cpu_count()} processors, Linux {platform.release()}, load average {load}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure and draw a budget that is changed.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "budget.svg")
    parser.add_argument("--raw", type=Path, help="write the samples as JSON, too")
    options = parser.parse_args()
    beside = Path(sys.executable).parent / "farmem"
    farmem = str(beside) if beside.exists() else shutil.which("farmem")
    if farmem is None:
        print("plot_budget: farmem is not built here: run `make build` first", file=sys.stderr)
        return 1
    print(machine())
    with tempfile.TemporaryDirectory(prefix="farmem-plot-") as name:
        samples = run(Path(name), farmem)
    title = "A program that uses 112 MiB, while `farmem set` changes its budget"
    options.output.write_text(svg_of(samples, title))
    if options.raw:
        options.raw.write_text(json.dumps(vars(samples)))
    print(f"{len(samples.local)} samples of local memory, {len(samples.budget)} of the budget\n")
    print(table(changes_of(samples)))
    print(f"\nEvery word was right. The plot is in {options.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
