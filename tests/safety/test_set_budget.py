"""A budget that is changed while the job runs takes effect, and no byte suffers by it.

Seen from outside: RssAnon in /proc, not farmem's own word.  What is waited for is a state;
the limits are there to end a hang.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import FARMEM, Job, Result, assert_ok, assert_paged, compile_c, start_farmem

pytestmark = [pytest.mark.safety, pytest.mark.uffd, pytest.mark.move]
MIB = 1 << 20
# How far local memory may be over the budget.
BOUND_BYTES = 16 * MIB
LIMIT_SECONDS = 60
LOOKS = 50


def anonymous_bytes(*pids: int) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
    return total


def wait_until(condition: Callable[[], bool], describe: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited too long: {describe()}"
        time.sleep(0.005)


def farmem(*words: str) -> str:
    done = subprocess.run(
        [str(FARMEM), *words], capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def set_budget(pid: int, mib: int) -> None:
    assert f"is {mib}.0 MiB" in farmem("set", str(pid), f"local={mib}M")


def status_of(pid: int) -> dict[str, Any]:
    [status] = json.loads(farmem("stat", str(pid), "--json"))["jobs"]
    assert isinstance(status, dict)
    return status


def wait_for_drain(mib: int, *pids: int) -> None:
    """Local memory comes down to the budget and stays there."""
    limit_bytes = mib * MIB + BOUND_BYTES
    wait_until(lambda: anonymous_bytes(*pids) <= limit_bytes, lambda: anonymous_bytes(*pids))
    for _ in range(LOOKS):
        assert anonymous_bytes(*pids) <= limit_bytes
        time.sleep(0.005)


def assert_budgets(result: Result, last_mib: int, peak_mib: int, changes: int) -> None:
    assert_ok(result)
    assert result.stats is not None
    assert result.stats["budget_bytes"] == last_mib * MIB
    assert result.stats["budget_peak_bytes"] == peak_mib * MIB
    assert result.stats["budget_changes"] == changes


def test_local_memory_follows_a_budget_up_and_down(tmp_path: Path) -> None:
    """Four times, under a program that uses all its memory and checks every word it meets."""
    program = compile_c("endless")
    with start_farmem([program, str(tmp_path / "stop")], local="32M") as job:
        job.await_out("ready")
        pid = job.program(program)
        for up, down in ((80, 24), (104, 48), (72, 16), (88, 32)):
            before = anonymous_bytes(pid)
            set_budget(pid, up)
            wanted = before + (up * MIB - before) // 2
            wait_until(lambda wanted=wanted: anonymous_bytes(pid) > wanted,  # type: ignore[misc]
                       lambda: anonymous_bytes(pid))  # fmt: skip
            set_budget(pid, down)
            wait_for_drain(down, pid)
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_SECONDS)
    assert_budgets(result, 32, 104, 8)
    assert_paged(result.stats, 10_000, 10_000)


def say(job: Job, rights: int) -> None:
    """Have the program check every word; this is so many times now."""
    assert job.process.stdin is not None
    job.process.stdin.write(b"check\n")
    job.process.stdin.flush()
    job.await_out("right\n" * rights)


@pytest.mark.parametrize("evict", [None, "copy"])
def test_a_lowered_budget_takes_memory_over_that_nobody_touches(evict: str | None) -> None:
    """The job had room for all, so nothing was managed; then it has not, and what has to go is
    not even looked at by the program.  Raised again, what is touched comes back and stays."""
    program = compile_c("idle")
    with start_farmem([program, "96"], local="256M", evict=evict, stdin=subprocess.PIPE) as job:
        job.await_out("ready")
        pid = job.program(program)
        assert [member["state"] for member in status_of(pid)["members"]] == ["watched"]
        assert anonymous_bytes(pid) > 96 * MIB
        set_budget(pid, 32)
        wait_for_drain(32, pid)
        status = status_of(pid)
        assert [member["state"] for member in status["members"]] == ["adopted"]
        assert status["remote_bytes"] > 40 * MIB
        say(job, 1)
        set_budget(pid, 200)
        say(job, 2)
        assert anonymous_bytes(pid) > 96 * MIB
        set_budget(pid, 16)
        wait_for_drain(16, pid)
        say(job, 3)
        assert job.process.stdin is not None
        job.process.stdin.close()
        result = job.finish(LIMIT_SECONDS)
    assert_budgets(result, 16, 256, 3)
    assert_paged(result.stats, 10_000, 10_000)


def test_a_lowered_budget_holds_for_all_processes_of_a_job_together() -> None:
    """Two processes share it by their need; none of them touches its memory meanwhile."""
    program = compile_c("idle")
    script = 'exec 3<&0; "$0" 64 <&3 & "$0" 64 <&3 & exec <&- 3<&-; wait'
    shell = ["/bin/sh", "-c", script, str(program)]
    with start_farmem(shell, local="256M", stdin=subprocess.PIPE) as job:
        job.await_out("ready\nready\n")
        members = status_of(job.process.pid)["members"]
        pids = [member["pid"] for member in members]
        assert len(pids) == 3
        assert anonymous_bytes(*pids) > 128 * MIB
        set_budget(pids[-1], 48)
        wait_for_drain(48, *pids)
        assert job.process.stdin is not None
        job.process.stdin.close()
        result = job.finish(LIMIT_SECONDS)
    assert result.stdout.count(b"ok\n") == 2, result.describe()
    assert_budgets(result, 48, 256, 1)
