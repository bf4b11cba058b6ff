"""make budget: the table of what the jobs of tests/survive held, as seen from outside.

Reads what their tests left in build/budget.json and writes docs/budget.md; judges nothing.
"""

import json
import os
import platform
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SEEN = ROOT / "build" / "budget.json"
PAGE = ROOT / "docs" / "budget.md"
MIB = 1 << 20

HEAD = """# The budget, seen from outside

The promise: a job's anonymous memory stays within its budget + 16 MiB, except for what a single
call brings at once (MAP_POPULATE: evicted at once) and what can't leave (mlock, pins: told by name)
(`tests/safety/test_budget.py`). What is seen: the anonymous memory of all processes of the job
together, memory that is shared since a fork counted once (Pss_Anon), sampled every 2-3 ms from
outside by `tests/sampler.py` while the programs of tests/survive run, each of them checked for its
right result.

| program | alone | budget | peak, of all runs | over the budget | runs | processes |
|---|---:|---:|---:|---:|---:|---:|
"""


def rows() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What was seen, by program and by share of its memory."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in SEEN.read_text().splitlines():
        row = json.loads(line)
        test, _, rest = row["test"].partition("[")
        words = rest.rstrip("]").removesuffix("-None").split("-")
        program = "redis, forking to save under load" if "redis" in test else words.pop(0)
        percent, *how = words
        found[f"{program}{', copied out' if how else ''}", f"{percent} %"].append(row)
    return found


def line_of(program: str, percent: str, seen: list[dict[str, Any]]) -> str:
    alone, budget, peak = (
        max(row[name] for row in seen) / MIB
        for name in ("plain_peak_bytes", "budget_bytes", "sampled_peak_bytes")
    )
    over = max(row["sampled_peak_bytes"] - row["budget_bytes"] for row in seen) / MIB
    processes = max(row["processes"] for row in seen)
    return (
        f"| {program} at {percent} | {alone:.0f} MiB | {budget:.1f} MiB | {peak:.1f} MiB "
        f"| {over:+.1f} MiB | {len(seen)} | {processes} |\n"
    )


def main() -> None:
    """Write the page."""
    table = "".join(line_of(*key, seen) for key, seen in rows().items())
    machine = (
        f"\nMeasured on {time.strftime('%Y-%m-%d')} with `make budget` on a machine with "
        f"{os.cpu_count()} processors and Linux {platform.release()}, load average at the end "
        f"{os.getloadavg()[0]:.1f}.\nWhere something else keeps the engine's threads from the "
        "processors, a program can be over its budget by as much as it fills meanwhile.\n"
    )
    PAGE.write_text(HEAD + table + machine)
    print(table)


if __name__ == "__main__":
    main()
