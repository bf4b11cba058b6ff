"""Threads that come and go, and signals, while memory is short.

What a thread needs to live and to end is anonymous memory too, and the kernel and libc
read it at moments when no fault can be served: it is never adopted. And the engine's
threads are in the program's process, but not the program's: no handler ever runs there.
"""

from __future__ import annotations

import pytest

from tests.harness import assert_defect_noticed, assert_ok, assert_paged, compile_c, run_farmem

pytestmark = [pytest.mark.safety, pytest.mark.uffd]
LOCAL = "32M"


@pytest.mark.parametrize("evict", [None, "copy"])
def test_thread_exit_and_join(evict: str | None) -> None:
    result = run_farmem([compile_c("thread_exit")], local=LOCAL, evict=evict)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


# Without rseq the kernel doesn't touch a thread's control block when it wakes up; with it, it
# brings the page back by accident, on the libc versions that keep it there.
NO_RSEQ = {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}


def test_thread_exit_and_join_without_rseq() -> None:
    result = run_farmem([compile_c("thread_exit")], local=LOCAL, env=NO_RSEQ)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


def test_thread_exit_and_join_notices() -> None:
    command = [compile_c("thread_exit")]
    assert_defect_noticed(command, "adopt_tls", local=LOCAL, timeout=20, env=NO_RSEQ)


def test_signal_handlers() -> None:
    result = run_farmem([compile_c("signals")], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


def test_signal_handlers_notice() -> None:
    noticed = assert_defect_noticed([compile_c("signals")], "open_signals", local=LOCAL)
    assert b"not the program's" in noticed.stderr, noticed.describe()
