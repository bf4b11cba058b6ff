"""`make bench` itself, small: every system really measures, and a stop leaves nothing behind.

Nothing is asserted about time.  What is looked at is what the tool left in its raw samples, and
what is left on the machine afterwards: swap, devices, cgroups, mounts, processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = [sys.executable, str(ROOT / "tools" / "bench.py"), "--quick"]
SECONDS_MAX = 300.0

pytestmark = [pytest.mark.bench, pytest.mark.root, pytest.mark.uffd, pytest.mark.move]


def traces() -> dict[str, set[str]]:
    """What a benchmark makes on a machine, by kind."""
    cgroups = Path("/sys/fs/cgroup")
    return {
        "swap": set(Path("/proc/swaps").read_text().splitlines()[1:]),
        "zram": {path.name for path in Path("/sys/block").glob("zram*")},
        "loop": {str(path) for path in Path("/sys/block").glob("loop*/loop/backing_file")},
        "cgroups": {str(p) for p in cgroups.glob("**/farmem-bench-*") if p.is_dir()},
        "mounts": {
            line for line in Path("/proc/mounts").read_text().splitlines() if "bench" in line
        },
        "files": {path.name for path in Path("/tmp").glob("farmem-bench-*")},
    }


@pytest.fixture
def undisturbed() -> dict[str, set[str]]:
    """What is there already; a machine with swap of its own can't be measured on."""
    if not Path("/sys/class/zram-control/hot_add").exists():
        pytest.skip("zram is not in this kernel")
    if Path("/proc/swaps").read_text().count("\n") > 1:
        pytest.skip("swap is on already: swapoff it")
    return traces()


def test_a_quick_run_measures_every_system(
    undisturbed: dict[str, set[str]], tmp_path: Path
) -> None:
    command = [*BENCH, "--only", "start,numpy", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    raw: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert raw["left_out"] == [] and raw["failures"] == [], done.stderr
    assert len(raw["start_ns"]) == 3
    runs = {run["system"]: run for run in raw["runs"]}
    assert sorted(runs) == ["everything local", "farmem", "loop", "zram"]
    for system, run in runs.items():
        # Programs of others can keep a farmem that is watched too seldom over its budget.
        if "over budget" in run.get("failed", ""):
            continue
        assert min(run["values"].values()) > 0, run
        assert (run["counts"]["pages_out"] > 1000) == (system != "everything local"), run
    page = (tmp_path / "bench.md").read_text()
    assert page in done.stdout and "## numpy" in page and "farmem : zram" in page
    assert traces() == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("system", ["zram", "loop"])
def test_a_stop_in_the_middle_leaves_nothing_behind(
    undisturbed: dict[str, set[str]], tmp_path: Path, system: str, number: int
) -> None:
    options = ["--only", "numpy", "--systems", system, "--rounds", "1000"]
    process = subprocess.Popen(
        [*BENCH, *options, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + SECONDS_MAX
        while system not in Path("/proc/swaps").read_text():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        # As the terminal does it: to every process of the group.
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=SECONDS_MAX)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number, err
    assert b"Not finished: stopped by" in out
    assert traces() == undisturbed
