"""A program may do to its descriptors what it likes.

It closes all of them, or puts others in their place: the engine's userfaultfd must not be
among them (its threads have a descriptor table of their own). It may also stop reading the
stderr that it shares with farmem: the engine writes to nothing that the program can hold.
"""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from tests.harness import (
    EXIT_FARMEM,
    Result,
    assert_defect_noticed,
    assert_ok,
    assert_paged,
    compile_c,
    kill_tree,
    run_farmem,
    start_farmem,
)

pytestmark = [pytest.mark.safety, pytest.mark.uffd]
LOCAL = "32M"


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("how", ["range", "loop", "dup2"])
def test_close_everything(how: str, when: str) -> None:
    result = run_farmem([compile_c("closefrom"), how, when], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("how", ["range", "dup2"])
def test_close_everything_notices(how: str) -> None:
    command = [str(compile_c("closefrom")), how, "late"]
    assert_defect_noticed(command, "share_descriptors", local=LOCAL, timeout=20)


def run_with_full_stderr(defects: list[str], timeout: float) -> tuple[Result, bytes]:
    """The program fills its stderr; nobody reads it before the program has ended. Stores
    fail often, so that the engine has something to say all the time."""
    reading, writing = os.pipe()
    heard: list[bytes] = []

    def drain() -> None:
        while chunk := os.read(reading, 65536):
            heard.append(chunk)

    with start_farmem(
        [compile_c("stderr_full")],
        local=LOCAL,
        stderr=writing,
        defects=defects,
        filters=["error:store=0.4,seed=5"],
    ) as job:
        os.close(writing)
        try:
            job.process.wait(timeout)
        except subprocess.TimeoutExpired:
            kill_tree(job.process)
            return Result(-9, b"", b"", None, timed_out=True), b""
        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        result = job.finish(20)
    reader.join(20)
    os.close(reading)
    return result, b"".join(heard)


def test_stderr_blocked_by_the_program() -> None:
    result, heard = run_with_full_stderr([], timeout=60)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert heard.startswith(b"....")


def test_stderr_blocked_notices() -> None:
    result, _ = run_with_full_stderr(["log_to_stderr"], timeout=20)
    assert result.returncode not in EXIT_FARMEM, result.describe()
    assert result.timed_out or result.returncode != 0, result.describe()
