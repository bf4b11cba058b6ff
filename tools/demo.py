"""`make demo`: one real program, three times: everything local, then with too little memory.

The program (demo_program.py) runs first by itself; its peak is what the budgets are taken from.
Local memory is sampled from outside, as RssAnon in /proc, so that nothing has to be believed;
pages out and in are farmem's own counters.  Ends with a table, and with exit status 1 if an output
differs from the plain run's or if a run that should have been short of memory never was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench_report import markdown_table
from demo_watch import Counters, LiveCounters, anonymous_bytes

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
SHARES = (50, 25)
SAMPLE_SECONDS = 0.02
TERMINAL_SECONDS = 0.2
LINE_SECONDS = 3.0
RUN_SECONDS_MAX = 180.0
STATS_SECONDS_MAX = 10.0


class DemoError(Exception):
    """The demo can't go on, or has shown something bad; the text says what."""


@dataclass(frozen=True)
class Run:
    """What came of one run."""

    name: str
    output: str
    seconds: float
    peak_bytes: int
    evicted: int = 0
    fetched: int = 0


def mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f} MiB"


class Progress:
    """One line that is written over and over on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = sys.stdout.isatty()
        self._every = TERMINAL_SECONDS if self._terminal else LINE_SECONDS
        self._next = self._every

    def show(self, seconds: float, local_bytes: int, counters: Counters | None) -> None:
        """Say how it stands, if it is time to."""
        if seconds < self._next:
            return
        self._next = seconds + self._every
        text = f"  {self._name}: {seconds:5.1f} s, {mib(local_bytes):>8} local"
        if counters is not None:
            text += f", {counters.evicted:,} pages evicted, {counters.fetched:,} fetched"
        if self._terminal:
            print(f"\r\033[K{text}", end="", flush=True)
        else:
            print(text, flush=True)

    def done(self, run: Run) -> None:
        """Leave one line behind that says how it went."""
        start = "\r\033[K" if self._terminal else ""
        text = f"  {run.name}: done in {run.seconds:.1f} s, {mib(run.peak_bytes)} local at most"
        print(start + text, flush=True)


def watch(process: subprocess.Popen[bytes], progress: Progress, live: LiveCounters | None) -> int:
    """Sample until the program ends; gives the peak."""
    start, peak_bytes, looked = time.monotonic(), 0, 0.0
    counters: Counters | None = None
    while process.poll() is None:
        seconds = time.monotonic() - start
        if seconds > RUN_SECONDS_MAX:
            raise DemoError(f"the program has not ended after {RUN_SECONDS_MAX:.0f} s")
        local_bytes = anonymous_bytes(process.pid)
        peak_bytes = max(peak_bytes, local_bytes)
        if live is not None and seconds - looked > TERMINAL_SECONDS:
            looked, counters = seconds, live.read()
        progress.show(seconds, local_bytes, counters)
        time.sleep(SAMPLE_SECONDS)
    return peak_bytes


def read_stats(path: Path) -> dict[str, int]:
    """The statistics: they come a moment after the program's end, whole or not at all."""
    end = time.monotonic() + STATS_SECONDS_MAX
    while not path.exists():
        if time.monotonic() > end:
            raise DemoError("farmem wrote no statistics")
        time.sleep(0.02)
    stats: dict[str, int] = json.loads(path.read_text())
    return stats


def run(name: str, farmem: list[str], folder: Path) -> Run:
    """Run the program, plain (farmem is empty) or under the command given."""
    stats_path = folder / f"stats-{len(list(folder.iterdir()))}.json"
    output_path = stats_path.with_suffix(".out")
    command = [sys.executable, str(HERE / "demo_program.py")]
    live = None
    if farmem:
        command = [*farmem, "--stats", str(stats_path), "--", *command]
        live = LiveCounters(stats_path)
    progress = Progress(name)
    start = time.monotonic()
    with output_path.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True
        )
        try:
            peak_bytes = watch(process, progress, live)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - start
    if process.returncode != 0:
        raise DemoError(f"{name}: the program ended with exit status {process.returncode}")
    stats = read_stats(stats_path) if farmem else {}
    result = Run(
        name,
        output_path.read_text(),
        seconds,
        peak_bytes,
        stats.get("pages_evicted", 0),
        stats.get("pages_fetched", 0),
    )
    progress.done(result)
    return result


def table(runs: list[Run]) -> str:
    """The runs side by side."""
    rows = [
        [
            item.name,
            f"{item.seconds:.1f} s",
            mib(item.peak_bytes),
            f"{item.evicted:,}",
            f"{item.fetched:,}",
            "the same" if item.output == runs[0].output else "DIFFERENT",
        ]
        for item in runs
    ]
    rows[0][-1] = "(reference)"
    header = ["", "time", "peak local memory", "pages out", "pages in", "output"]
    return markdown_table(header, rows)


def judge(runs: list[Run]) -> None:
    """The two ways in which a demo would be a lie."""
    for item in runs[1:]:
        if item.output != runs[0].output:
            raise DemoError(
                f"{item.name}: the output differs from the plain run's: a bug of farmem's"
            )
        if item.evicted == 0 or item.fetched == 0:
            raise DemoError(f"{item.name}: no page went out and came back: nothing was shown")


def find_farmem() -> str:
    beside = Path(sys.executable).parent / "farmem"
    found = str(beside) if beside.exists() else shutil.which("farmem")
    if found is None:
        raise DemoError("farmem is not built here: run `make build` first")
    return found


def demo() -> None:
    """The three runs, the table, the verdict."""
    farmem = find_farmem()
    print("An order book in plain Python: loaded, indexed, sorted, looked up. It is not changed,")
    print("not told, and does not fit: farmem pages it out to the pool `mem:` and back. (That pool")
    print("is memory of this host, for trying: a real one is elsewhere.)\n")
    with tempfile.TemporaryDirectory(prefix="farmem-demo-") as name:
        folder = Path(name)
        runs = [run("everything local", [], folder)]
        for share in SHARES:
            budget = runs[0].peak_bytes * share // 100
            label = f"farmem run -m {budget // MIB}M ({share} %)"
            runs.append(run(label, [farmem, "run", "-q", "-m", f"{budget // MIB}M"], folder))
    print(f"\n{table(runs)}\n")
    judge(runs)
    print(
        "Every line that the program printed is the same. Try it: farmem run -m 1G -- YOUR PROGRAM"
    )


def main() -> int:
    try:
        demo()
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
