"""`make bench`: what farmem costs, measured beside what it stands against, in one run.

Three questions, each answered by alternating runs, so that a slow moment of the machine falls on
all alike:

1. starting: `farmem run -- true` against `true`                               (bench_fits.py);
2. memory is not short: programs that fit their budget, under farmem and plain (bench_fits.py);
3. memory is short: the same programs (bench_work.py, bench_redis.py) with everything local, under
   farmem, and in a memory cgroup with the kernel's swap to zram and to a RAM-backed loop device
   (bench_place.py, bench_swap.py), with 100 to 10 % of what they need.

A system that this machine can't measure is left out, and the report says which and why.  Every
run's result is checked; one that is wrong, did not page, or held more than it was given is counted
as failed, never as a figure.  The tables go to stdout, tables and raw samples to files in --output.
Nothing is left behind: no process, device, cgroup or mount.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import bench_fits
import bench_text
from bench_machine import NoiseMeter, available_bytes, describe
from bench_place import FARMEM, LOCAL, Systems, prepare_systems
from bench_redis import Redis
from bench_report import clock
from bench_run import STOP, Failed, Stopped
from bench_state import FULL, LEVELS, PARTS, QUICK, SYSTEMS, Bench, Settings, say
from bench_swap import MIB, Unavailable
from bench_work import PATTERNS, Grid, Numpy, Sort, Workload

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks.md"


def make_workloads(bench: Bench, folder: Path) -> None:
    """The programs that were asked for, their inputs made; what can't be had is left out."""
    settings = bench.settings
    size = settings.application_mib
    makers: list[tuple[str, Callable[[], Workload]]] = [
        ("grid", partial(Grid, folder, settings.mib, pattern)) for pattern in PATTERNS
    ]
    makers += [("sort", partial(Sort, folder, size)), ("numpy", partial(Numpy, size))]
    makers += [("redis", partial(Redis, size))]
    for part, make in makers:
        if part not in settings.parts:
            continue
        try:
            bench.workloads.append(make())
        except Unavailable as error:
            bench.left_out.append(f"{part}: {error}")


def calibrate(bench: Bench) -> None:
    """A run of each with everything local: what it needs, and a warm start for all."""
    for work in list(bench.workloads):
        say(f"[{clock(bench.elapsed())}] what it needs: {work.name}")
        try:
            bench.need_bytes[work.name] = work.calibrate()
        except (Failed, ValueError) as error:
            bench.failures.append(f"{work.name}, everything local: {error}")
            bench.workloads.remove(work)


def run_rounds(bench: Bench, systems: Systems, noise: NoiseMeter) -> None:
    """Round after round over all programs and levels; the systems take turns at going first."""
    settings = bench.settings
    names = [name for name in settings.systems if name in systems.make]
    longest = 0.0
    for turn in range(1, settings.rounds + 1):
        start = bench.elapsed()
        if turn > 1 and start + longest > settings.minutes * 60:
            say(f"a round more would take longer than {settings.minutes:.0f} minutes in all")
            break
        for work in bench.workloads:
            say(f"[{clock(bench.elapsed())}] round {turn} of {settings.rounds}: {work.name}")
            noise.look()
            bench.measure(work, 0, LOCAL, systems, turn)
            for level in settings.levels:
                for i in range(len(names)):
                    name = names[(i + turn) % len(names)]
                    bench.measure(work, level, name, systems, turn)
        bench.rounds_done = turn
        longest = max(longest, bench.elapsed() - start)


def run_when_enough(bench: Bench, systems: Systems, noise: NoiseMeter, folder: Path) -> None:
    """The parts in which memory is not short."""
    settings, make = bench.settings, systems.make.get(FARMEM)
    if make is None:
        return
    if "start" in settings.parts:
        say(f"[{clock(bench.elapsed())}] starting")
        noise.look()
        try:
            bench.starts = bench_fits.measure_start(make, settings.starts)
        except Failed as error:
            bench.failures.append(f"starting: {error}")
    if "fits" not in settings.parts:
        return
    for work in (bench_fits.GridFits(folder), bench_fits.PythonFits()):
        for share in bench_fits.SHARES_PERCENT:
            say(f"[{clock(bench.elapsed())}] fits its budget: {work.name}, {share} %")
            noise.look()
            least = 2 if settings.quick else bench_fits.PAIRS_MIN
            try:
                bench.fits.append(
                    bench_fits.measure_fits(work, share, make, settings.fits_seconds, least)
                )
            except (Failed, ValueError) as error:
                bench.failures.append(f"fits its budget, {work.name}, {share} %: {error}")


def farmem_command() -> Path | None:
    """The farmem of the environment that this Python belongs to, or else the one on the PATH."""
    beside = Path(sys.executable).parent / "farmem"
    if beside.exists():
        return beside
    found = shutil.which("farmem")
    return Path(found) if found else None


def run_bench(bench: Bench, noise: NoiseMeter) -> None:
    settings = bench.settings
    swap_mib = 2 * max(settings.mib, settings.application_mib + 64)
    # The loop device's memory, what zram and `mem:` may hold, and the program itself.
    need_mib = swap_mib + 2 * settings.mib
    if 0 < available_bytes() < need_mib * MIB:
        raise Unavailable(
            f"{available_bytes() // MIB} MiB of memory are available and {need_mib} MiB needed: "
            "lower --mib"
        )
    with contextlib.ExitStack() as stack:
        systems = prepare_systems(settings.systems, farmem_command(), swap_mib * MIB, stack)
        bench.left_out += [f"{name}: {why}" for name, why in systems.left_out.items()]
        for line in bench.left_out:
            say(f"left out: {line}")
        run_when_enough(bench, systems, noise, settings.output)
        make_workloads(bench, settings.output)
        calibrate(bench)
        run_rounds(bench, systems, noise)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def parse_arguments() -> Settings:
    parser = argparse.ArgumentParser(prog="bench", description="Measure farmem; see tools/bench.py")
    parser.add_argument(
        "--only", dest="parts", type=words, metavar="PART,...", help=f"of {','.join(PARTS)}"
    )
    parser.add_argument("--systems", type=words, metavar="NAME,...", help=f"of {','.join(SYSTEMS)}")
    parser.add_argument("--levels", type=numbers, metavar="N,...", help="percent local")
    parser.add_argument("--rounds", type=int, help="at most so many rounds (default 3)")
    parser.add_argument("--mib", type=int, help="size of the grid (default 512)")
    parser.add_argument("--starts", type=int, help="pairs of starts (default 40)")
    parser.add_argument("--fits-seconds", type=float, help="limit for each program that fits")
    parser.add_argument(
        "--minutes", type=float, help="begin no round that would end later (default 25)"
    )
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it works")
    parser.add_argument(
        "--docs", action="store_true", default=None, help="write docs/benchmarks.md as well"
    )
    parser.add_argument("--output", type=Path, help="folder (default build/bench)")
    given = parser.parse_args()
    base = QUICK if given.quick else FULL
    chosen = {k: v for k, v in vars(given).items() if v is not None and k != "quick"}
    settings = replace(base, **chosen)
    if problem := find_problem(settings):
        parser.error(problem)
    return settings


def find_problem(settings: Settings) -> str:
    """What is wrong with the settings, and what to type instead; empty when nothing is."""
    for name, known in (("parts", PARTS), ("systems", SYSTEMS)):
        if wrong := [word for word in getattr(settings, name) if word not in known]:
            return f"there is no {wrong[0]!r} among the {name}: choose from {', '.join(known)}"
    lowest = min(settings.levels, default=0)
    smallest = settings.smallest_mib() * lowest // 100
    whole = (set(settings.parts), set(settings.systems), set(settings.levels))
    wrong_if = {
        "--levels must lie between 1 and 100 percent: type --levels 50,25": lowest < 1
        or max(settings.levels) > 100,
        "--rounds and --starts must be at least 1": min(settings.rounds, settings.starts) < 1,
        "--mib must be at least 64: smaller grids measure the caches": settings.mib < 64,
        f"{lowest} % is less than farmem's minimum of 16 MiB: raise --mib": smallest < 16,
        "--docs is for whole runs: leave out --quick, --only, --systems and --levels": settings.docs
        and (settings.quick or whole != (set(PARTS), set(SYSTEMS), set(LEVELS))),
    }
    return next((problem for problem, is_so in wrong_if.items() if is_so), "")


def take_lock() -> socket.socket:
    """One benchmark at a time on a machine; the name goes with the process."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind("\0farmem-bench")
    except OSError as error:
        lock.close()
        raise Unavailable("another benchmark runs on this machine: wait for its end") from error
    return lock


def write_reports(bench: Bench, noise: NoiseMeter, stopped: str) -> None:
    settings = bench.settings
    facts = describe()
    measured = noise.finish()
    text = bench_text.report(bench, facts, measured, stopped)
    raw = {
        "machine": facts,
        "noise": asdict(measured),
        "settings": asdict(settings) | {"output": None},
        "seconds": bench.elapsed(),
        "rounds_done": bench.rounds_done,
        "stopped": stopped,
        "left_out": bench.left_out,
        "failures": bench.failures,
        "need_bytes": bench.need_bytes,
        "start_ns": bench.starts,
        "fits_ns": [asdict(row) for row in bench.fits],
        "runs": bench.runs,
    }
    (settings.output / "bench.json").write_text(json.dumps(raw, indent=1) + "\n")
    (settings.output / "bench.md").write_text(text)
    print(text)
    say(f"tables and raw samples are in {os.path.relpath(settings.output)}")
    if settings.docs and not stopped:
        DOCS.write_text(text)
        say(f"written: {os.path.relpath(DOCS)}")


def say_how_long(settings: Settings) -> None:
    seconds, limit_s = settings.estimate_seconds(), settings.minutes * 60
    text = f"about {clock(seconds)} minutes on a quiet machine"
    if seconds > limit_s:
        text += f"; no round begins that would end after {clock(limit_s)}, so fewer rounds may do"
    say(text)


def main() -> int:
    settings = parse_arguments()
    STOP.install()
    settings.output.mkdir(parents=True, exist_ok=True)
    stopped, status = "", 0
    try:
        with contextlib.closing(take_lock()):
            say_how_long(settings)
            bench, noise = Bench(settings), NoiseMeter()
            try:
                run_bench(bench, noise)
            except Stopped as error:
                stopped, status = str(error), 128 + error.number
            write_reports(bench, noise, stopped)
    except (Unavailable, Failed) as error:
        say(str(error))
        return 1
    if failed := bench.failed_runs():
        say(f"runs that failed: {failed}; the report says which")
    return status or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
