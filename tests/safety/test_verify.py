"""Threads that read and write memory in every order and check every word.

The plainest use of memory, on both eviction paths: MOVE, which the kernel makes atomic,
and the copy path, forced, which has to be made safe by write-protection. Then with a pool
whose reads and writes fail or lie now and then: the bytes are right, or the program dies
by SIGBUS and is told why; never anything in between.
"""

from __future__ import annotations

import pytest

from tests.harness import (
    Result,
    assert_defect_noticed,
    assert_ok,
    assert_paged,
    compile_c,
    run_farmem,
)

pytestmark = [pytest.mark.safety, pytest.mark.uffd]
LOCAL = "48M"


def assert_right_or_lost(result: Result) -> None:
    """Right bytes to the end, or death by SIGBUS with a message that says "lost"."""
    if result.returncode == 0:
        assert_ok(result)
    else:
        assert result.returncode == -7, result.describe()
        assert b"lost" in result.stderr, result.describe()


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("evict", [None, "copy"])
def test_every_word(evict: str | None, threads: int) -> None:
    result = run_farmem([compile_c("verify"), str(threads)], local=LOCAL, evict=evict)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None
    if evict == "copy":
        assert result.stats["pages_copied_out"] >= 1000, result.stats


@pytest.mark.parametrize(
    ("defect", "evict"), [("drop_unread", "copy"), ("skip_store", None), ("skip_store", "copy")]
)
def test_every_word_notices(defect: str, evict: str | None) -> None:
    """drop_unread: the copy path without write-protection loses what is written between the
    copy and the drop. skip_store: a dirty page that is taken for a clean one."""
    command = [str(compile_c("verify")), "4", "96", "4"]
    assert_defect_noticed(command, defect, local=LOCAL, evict=evict)


def test_failing_reads_are_tried_again() -> None:
    result = run_farmem(
        [compile_c("verify")], local=LOCAL, filters=["error:fetch=0.01,seed=1"], check=False
    )
    assert_right_or_lost(result)
    assert result.stats is not None and result.stats["fetch_retries"] >= 1, result.describe()


def test_failing_writes_keep_the_page() -> None:
    """A store that fails must leave the page where it is; the program sees nothing of it."""
    result = run_farmem([compile_c("verify")], local=LOCAL, filters=["error:store=0.5,seed=2"])
    assert_ok(result)
    assert result.stats is not None and result.stats["store_errors"] >= 1, result.describe()


def test_lying_reads_are_found_out() -> None:
    result = run_farmem(
        [compile_c("verify")], local=LOCAL, filters=["error:corrupt=0.002,seed=3"], check=False
    )
    assert_right_or_lost(result)
    assert result.stats is not None and result.stats["fetch_retries"] >= 1, result.describe()


def test_lying_reads_would_be_noticed() -> None:
    """Without the check of the hash the same corruption reaches the program."""
    noticed = assert_defect_noticed(
        [compile_c("verify")], "no_hash_check", local=LOCAL, filters=["error:corrupt=0.01,seed=3"]
    )
    assert noticed.returncode == 1 and b"wrong byte" in noticed.stderr, noticed.describe()


@pytest.mark.parametrize("fault", ["corrupt=1", "fetch=1"])
def test_a_lost_page_is_a_bus_error(fault: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """From some moment on no read succeeds: every page that is only in the pool is lost.
    The program touches them all and counts: right bytes or SIGBUS, EFAULT from a system
    call, and a message that names the page. What it discards then is usable again."""
    armed = tmp_path_factory.mktemp("lost") / "armed"
    result = run_farmem(
        [compile_c("lost"), str(armed)], local="32M", filters=[f"error:{fault},file={armed}"]
    )
    assert_ok(result)
    words = dict(item.split("=") for item in result.stdout.decode().splitlines()[-2].split())
    assert int(words["lost"]) > 0, result.describe()
    assert result.stats is not None and result.stats["pages_lost"] >= 1
    assert b"lost" in result.stderr, result.describe()
    assert words["first"].removeprefix("0x").encode() in result.stderr, result.describe()
