"""The budget's exceptions: what one call brings beyond it leaves at once, or is told by name.

Everything else is held against the bound where it is run: tests/survive/test_programs.py.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.harness import Job, Result, assert_ok, compile_c, start_farmem

pytestmark = [pytest.mark.safety, pytest.mark.uffd, pytest.mark.move]
MIB = 1 << 20
BUDGET_BYTES = 32 * MIB
BOUND_BYTES = BUDGET_BYTES + 16 * MIB
LIMIT_SECONDS = 60


@contextmanager
def brought(how: str, mib: int) -> Iterator[Job]:
    """The program has made its call, and waits."""
    command = [compile_c("at_once"), how, str(mib)]
    with start_farmem(command, local=str(BUDGET_BYTES), sampled=True, stdin=subprocess.PIPE) as job:
        assert job.out is not None
        if not job.out.wait_for(b"there", LIMIT_SECONDS):
            result = finish(job)
            if b"not possible here" in result.stdout:
                pytest.skip(result.stdout.decode().strip())
            raise AssertionError(result.describe())
        yield job


def finish(job: Job) -> Result:
    assert job.process.stdin is not None
    job.process.stdin.close()
    return job.finish(LIMIT_SECONDS)


def settles(job: Job) -> bool:
    """Is the job within its budget soon, from outside?"""
    assert job.sampler is not None
    end = time.monotonic() + LIMIT_SECONDS
    while job.sampler.now_bytes > BUDGET_BYTES + MIB and time.monotonic() < end:
        time.sleep(0.005)
    return job.sampler.now_bytes <= BUDGET_BYTES + MIB


def test_what_one_call_populates_is_drained() -> None:
    with brought("populate", 192) as job:
        assert settles(job), job.sampler
        result = finish(job)
    assert_ok(result)
    assert result.stats is not None and result.stats["pages_evicted"] > 40_000, result.stats
    assert b"can't leave" not in result.stderr, result.describe()


@pytest.mark.parametrize("how", ["mlock", "pin"])
def test_what_cannot_leave_is_told_by_name(how: str) -> None:
    with brought(how, 64) as job:
        job.await_err("that can't leave")
        result = finish(job)
    assert_ok(result)
    text = result.stderr.decode()
    assert "over the share of the budget by " in text, text
    assert ("64 MiB are locked (mlock)" if how == "mlock" else "pinned by a device") in text, text
    assert result.sampled_peak_bytes > BOUND_BYTES, "nothing is shown"
