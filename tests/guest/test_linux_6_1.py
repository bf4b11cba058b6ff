"""farmem on Linux 6.1 (Debian 12's), where there is no UFFDIO_MOVE, no POISON, no PAGEMAP_SCAN.

Every page leaves there by the copy path. A guest is booted once, in software emulation
(tools/guest.sh), and runs the batch of cases.py; each case is judged here by itself. The
programs check their own bytes, and the counters must show that pages went out and came back.
"""

from __future__ import annotations

import re

import pytest

from tests.guest.booted import Batch, assert_kernel_content, run_batch, set_up
from tests.guest.cases import LOST, REFUSED, SAFETY, WORDS_PERCENT, Case, compile_all
from tests.harness import Result, assert_ok, assert_paged

pytestmark = [pytest.mark.safety, pytest.mark.guest]

PAGE_BYTES = 4096


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Boot the guest and run everything in it, once."""
    set_up()
    compile_all()
    return run_batch("tests.guest.batch", tmp_path_factory.mktemp("guest") / "kernel.log")


def assert_copied(result: Result, evicted_pages: int, fetched_pages: int) -> None:
    """The copy path did it, and nothing else."""
    assert_paged(result.stats, evicted_pages, fetched_pages)
    assert result.stats is not None
    assert result.stats["pages_copied_out"] == result.stats["pages_evicted"], result.stats
    assert result.stats["pages_moved_out"] == 0, result.stats
    assert result.stats["pages_lost"] == 0, result.stats


def test_it_is_that_kernel(batch: Batch) -> None:
    assert batch.take("kernel")["release"].startswith("6.1."), batch.found["kernel"]


def test_refused_unless_nothing_is_pinned(batch: Batch) -> None:
    """One sentence with what was wrong, one with what to type instead."""
    result = batch.result(REFUSED.name)
    assert result.returncode == 125, result.describe()
    first, second = result.stderr.decode().strip().splitlines()
    assert "no UFFDIO_MOVE" in first and "6.1." in first, result.describe()
    assert "--no-pinned-io" in second, result.describe()


@pytest.mark.parametrize("case", SAFETY, ids=lambda case: case.name)
def test_right_bytes(batch: Batch, case: Case) -> None:
    result = batch.result(case.name)
    assert_ok(result)
    assert_copied(result, 1000, 500)
    assert result.stats is not None
    if case.command.startswith("forks"):
        assert result.stats["forks"] >= 1, result.stats
    if case.filters:
        assert result.stats["store_errors"] >= 1, result.stats


@pytest.mark.parametrize("percent", WORDS_PERCENT)
def test_same_result(batch: Batch, percent: int) -> None:
    """tests/survive/words.c at a part of its own peak of memory."""
    found = batch.take(f"words_{percent}")
    result = batch.result(f"words_{percent}")
    assert result.returncode == 0 and not result.timed_out, result.describe()
    assert found["stdout"] == found["plain_stdout"], result.describe()
    must_leave = (found["plain_peak_bytes"] - found["budget_bytes"]) // PAGE_BYTES // 2
    assert_copied(result, must_leave, 500)


def test_a_lost_page_ends_the_program(batch: Batch) -> None:
    """Before Linux 6.6 a page can't be poisoned: who touches one that is lost is ended, and
    told its address. A wrong byte would be told by the program itself."""
    result = batch.result(LOST.name)
    assert result.returncode == -9, result.describe()
    text = result.stderr.decode()
    told = re.search(r"was touched, .* ends the program; address (0x[0-9a-f]+)", text)
    assert told, result.describe()
    assert re.search(rf"page lost: .* address {told[1]}\b", text), result.describe()
    assert "wrong byte" not in text, result.describe()
    assert result.stats is not None and result.stats["pages_lost"] >= 1, result.describe()


def test_the_kernel_has_nothing_to_complain_of(batch: Batch) -> None:
    assert_kernel_content(batch.log)
