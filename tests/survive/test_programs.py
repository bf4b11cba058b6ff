"""Programs that know nothing of farmem must give the same bytes with too little memory.

Each runs plain once; that run's peak of anonymous memory sets the budgets of 50 and 25 %.  Under
farmem the output must then be equal, and the counters must show that pages went out and came back:
a run that was never short of memory would prove nothing.  Some are run again with eviction by
copying forced (FARMEM_TEST_EVICT=copy), because MOVE is what they would take by themselves; and
some with a file for a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.harness import Result, assert_paged, free_space_folder, run_farmem
from tests.survive.budget import TRIES, within_budget
from tests.survive.plain import Plain
from tests.survive.programs import WORKLOADS, Call, Workload

pytestmark = [pytest.mark.survive, pytest.mark.uffd, pytest.mark.move]

PAGE_BYTES = 4096
FETCHED_PAGES_MIN = 256
COPIED = [
    workload for workload in WORKLOADS if workload.name in ("sort", "sqlite", "numpy", "words")
]

Prepare = Callable[[Workload], tuple[Call, Plain]]


def survive(
    call: Call, plain: Plain, percent: int, evict: str | None = None, **options: Any
) -> Result:
    """Run under farmem and compare; gives the result for more questions."""
    budget = plain.budget_bytes(percent)
    result = run_farmem(
        call.command,
        local=str(budget),
        timeout=60 + 60 * plain.seconds,
        evict=evict,
        stdin=call.stdin,
        **options,
    )
    assert call.digest(result.stdout) == plain.digest, result.describe()
    assert result.stats is not None
    assert result.stats["budget_bytes"] == budget
    # At its peak the program held peak_bytes, and no more than the budget of them was local.
    # Half of the difference leaves room for a peak that scheduling makes a little lower.
    must_leave = (plain.peak_bytes - budget) // PAGE_BYTES // 2
    assert_paged(result.stats, must_leave, FETCHED_PAGES_MIN)
    assert result.stats["pages_lost"] == 0, result.stats
    return result


@pytest.mark.parametrize("percent", [50, 25])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_same_result(prepared: Prepare, workload: Workload, percent: int) -> None:
    call, plain = prepared(workload)
    for _ in range(TRIES):
        result = survive(call, plain, percent, sampled=True)
        assert result.stats is not None and result.stats["pages_moved_out"] > 0, result.stats
        if within_budget(result, plain.peak_bytes):
            return
    raise AssertionError(f"over the budget by more than 16 MiB, each time: {result.describe()}")


@pytest.mark.parametrize("workload", COPIED, ids=lambda workload: workload.name)
def test_same_result_when_copied_out(prepared: Prepare, workload: Workload) -> None:
    stats = survive(*prepared(workload), 50, evict="copy").stats
    assert stats is not None
    assert stats["pages_copied_out"] > 0, stats
    assert stats["pages_moved_out"] == 0, stats


@pytest.mark.parametrize("way", ["auto", "threads"])
@pytest.mark.parametrize("workload", COPIED, ids=lambda workload: workload.name)
def test_same_result_through_a_file(prepared: Prepare, workload: Workload, way: str) -> None:
    pool = ("--pool", f"file:{free_space_folder()}")
    call, plain = prepared(workload)
    stats = survive(call, plain, 50, options=pool, env={"FARMEM_TEST_FILE_IO": way}).stats
    assert stats is not None
    assert stats["transfers_uring"] + stats["transfers_threads"] > 0, stats
    assert way == "auto" or stats["transfers_uring"] == 0, stats
