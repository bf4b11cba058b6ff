"""What tests of jobs on servers share: the words for several pools, a job that runs until it is
told to end, and what is left of one whose server has died.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.harness import Job, Result, assert_ok, compile_c, start_farmem

LIMIT_S = 90
LOST_PAGES = 24 * 256  # what the program `lost` has


def options_of(*urls: str) -> tuple[str, ...]:
    """Several pools, on the command line."""
    return tuple(word for url in urls for word in ("--pool", url))


@contextlib.contextmanager
def endless(folder: Path, options: Sequence[str]) -> Iterator[Job]:
    """A job that pages until somebody says stop(), or it is ended."""
    with start_farmem(
        [compile_c("endless"), str(folder / "stop")], local="32M", options=options
    ) as job:
        job.await_out("ready")
        yield job


def stop(job: Job, folder: Path) -> Result:
    """Every byte was right."""
    (folder / "stop").touch()
    result = job.finish(LIMIT_S)
    assert_ok(result)
    return result


def assert_some_lost(result: Result) -> None:
    """Of the program `lost`: it met pages that are lost, and others that are right."""
    assert_ok(result)
    found = re.search(rb"lost=(\d+) ", result.stdout)
    assert found and 500 < int(found[1]) < LOST_PAGES - 500, result.describe()
