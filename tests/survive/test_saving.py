"""The real saving: a job that does not fit in a memory cgroup, and runs there through `file:`.

The cgroup (v1) counts everything: the program, farmem, its supervisor, and the page cache that
direct I/O does without. Alone the program is killed there; with the pool in memory as well,
because those pages count too.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import FARMEM, farmem_environment, free_space_folder
from tests.survive.plain import Plain
from tests.survive.programs import WORKLOADS, Call, Workload
from tools.bench_swap import MemoryGroup, Unavailable, memory_group

pytestmark = [pytest.mark.survive, pytest.mark.uffd, pytest.mark.move, pytest.mark.root]

# Of what the program needs alone, so much may be there in all, and so much be its budget: room
# for the supervisor, and for what is over the budget for a moment.
LIMIT_PERCENT = 80
BUDGET_PERCENT = 45
LIMIT_S = 300
JOBS = [workload for workload in WORKLOADS if workload.name in ("numpy", "sqlite", "words")]

Prepare = Callable[[Workload], tuple[Call, Plain]]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=free_space_folder()) as name:
        yield Path(name)


def run_in(group: MemoryGroup, call: Call, *before: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        group.wrap([*before, *call.command]),
        input=call.stdin or b"",
        capture_output=True,
        env=farmem_environment(),
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize("workload", JOBS, ids=lambda workload: workload.name)
def test_what_is_killed_without_runs_through_a_file(
    prepared: Prepare, workload: Workload, folder: Path
) -> None:
    call, plain = prepared(workload)
    budget = ("-m", str(plain.budget_bytes(BUDGET_PERCENT)))
    try:
        with memory_group(plain.budget_bytes(LIMIT_PERCENT)) as group:
            (group.path / "memory.swappiness").write_text("0")  # whatever swap the host has
            alone = run_in(group, call)
            in_memory = run_in(group, call, str(FARMEM), "run", *budget, "--")
            through_file = run_in(
                group, call, str(FARMEM), "run", *budget, "--pool", f"file:{folder}", "--"
            )
    except Unavailable as error:
        pytest.skip(str(error))
    assert alone.returncode == -signal.SIGKILL, alone
    assert in_memory.returncode == -signal.SIGKILL, in_memory
    assert through_file.returncode == 0, through_file.stderr[-2000:]
    assert call.digest(through_file.stdout) == plain.digest
