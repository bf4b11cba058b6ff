"""Deaths: of the program in the middle of a write or a fault, of its parent, of the supervisor.

A dying program must not send zeros: its missing pages read as zeros once the last copy of
its userfaultfd has gone, which is why the supervisor holds one (defect `no_duplicate`).
No sleeping fault may keep a process from ending. Whoever dies, the others have the right
bytes or die too, and nothing stays behind: no process, no socket, no shared memory.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.harness import (
    Job,
    assert_defect_noticed,
    assert_ok,
    assert_paged,
    compile_c,
    run_farmem,
    start_farmem,
)

pytestmark = [pytest.mark.safety, pytest.mark.uffd]
LOCAL = "32M"


@pytest.mark.parametrize("how", ["exit", "kill"])
@pytest.mark.parametrize("sink", ["pipe", "socket"])
def test_death_while_writing_missing_pages(sink: str, how: str) -> None:
    result = run_farmem([compile_c("death_writes"), sink, how, "20"], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("sink", ["pipe", "socket"])
def test_death_while_writing_notices(sink: str) -> None:
    """Seen here without the duplicate: zeros in 15 of 200 deaths (pipe), 70 of 200 (socket)."""
    command = [str(compile_c("death_writes")), sink, "kill", "60"]
    assert_defect_noticed(command, "no_duplicate", local=LOCAL, timeout=90)


@pytest.mark.parametrize("how", ["exit", "exec"])
def test_end_with_faults_blocked(how: str) -> None:
    result = run_farmem(
        [compile_c("blocked_end"), how], local=LOCAL, filters=["delay:rtt=50ms"], timeout=60
    )
    assert_ok(result)


def test_sigkill_with_faults_blocked() -> None:
    program = compile_c("blocked_end")
    with start_farmem([program, "wait"], local=LOCAL, filters=["delay:rtt=50ms"]) as job:
        job.await_out("ready", 60)
        os.kill(job.process.pid, signal.SIGKILL)
        assert job.process.wait(20) == -signal.SIGKILL
        assert job.gone(20), "processes of the job were left behind"


def leftovers(job: Job, name: str) -> list[str]:
    """What a job that has ended must not leave: processes, its socket, files in memory."""
    left = [f"process {pid}" for pid in job.job_processes()]
    sockets = Path("/proc/net/unix").read_text().splitlines()
    left += [line for line in sockets if line.endswith(f"@{name}")]
    shared = Path("/dev/shm")
    if shared.is_dir():
        left += [str(path) for path in shared.iterdir() if name in path.name]
    return left


def assert_nothing_left(job: Job, name: str) -> None:
    job.gone(20)
    assert leftovers(job, name) == []


def start_endless(job: Job, program: Path) -> tuple[int, str]:
    """Waits until the program is paging; its process id and its job's name."""
    job.await_out("ready", 60)
    pid = job.program(program)
    return pid, job.job_name(pid)


def test_kill_the_program(tmp_path: Path) -> None:
    program = compile_c("endless")
    with start_farmem([program, str(tmp_path / "stop")], local=LOCAL) as job:
        pid, name = start_endless(job, program)
        os.kill(pid, signal.SIGKILL)
        result = job.finish(20)
        assert result.returncode == -signal.SIGKILL, result.describe()
        assert_paged(result.stats, 1000, 1000)
        assert_nothing_left(job, name)


def test_kill_the_supervisor(tmp_path: Path) -> None:
    """The program goes on with the right bytes, or it dies and says why; nothing between."""
    program = compile_c("endless")
    with start_farmem([program, str(tmp_path / "stop")], local=LOCAL) as job:
        _, name = start_endless(job, program)
        os.kill(job.supervisor(), signal.SIGKILL)
        time.sleep(1.0)  # some more rounds without it
        (tmp_path / "stop").touch()
        result = job.finish(60, wait_stats_s=0)
        assert not result.timed_out, result.describe()
        assert b"wrong byte" not in result.stderr, result.describe()
        if result.returncode == 0:
            assert_ok(result)
        else:
            assert result.returncode != 1, result.describe()
        assert_nothing_left(job, name)


def test_fork_after_the_supervisor_has_died(tmp_path: Path) -> None:
    """A child can't be taken on any more: it has the right bytes or dies with a message."""
    program = compile_c("forks")
    with start_farmem([program, "thread", "5"], local=LOCAL) as job:
        job.program(program)
        time.sleep(1.0)
        os.kill(job.supervisor(), signal.SIGKILL)
        result = job.finish(60, wait_stats_s=0)
        assert not result.timed_out, result.describe()
        assert b"wrong byte" not in result.stderr, result.describe()
        assert job.gone(20)


def test_kill_the_parent(tmp_path: Path) -> None:
    """farmem's caller, a shell, is killed: the program is an orphan, and goes on."""
    program = compile_c("endless")
    wrapper = ["/bin/sh", "-c", '"$@" & wait', "sh"]
    with start_farmem([program, str(tmp_path / "stop")], local=LOCAL, wrapper=wrapper) as job:
        pid, name = start_endless(job, program)
        assert pid != job.process.pid
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait(20)
        time.sleep(0.5)
        (tmp_path / "stop").touch()
        job.await_out("ok\n", 60)
        result = job.finish(20)
        assert b"wrong byte" not in result.stderr, result.describe()
        assert_paged(result.stats, 1000, 1000)
        assert_nothing_left(job, name)


def test_nothing_left_after_an_ordinary_end(tmp_path: Path) -> None:
    program = compile_c("endless")
    with start_farmem([program, str(tmp_path / "stop")], local=LOCAL) as job:
        _, name = start_endless(job, program)
        assert leftovers(job, name), "the job is not seen while it runs: this test sees nothing"
        (tmp_path / "stop").touch()
        assert_ok(job.finish(60))
        assert_nothing_left(job, name)


GROWS_AND_FORKS = """
import os, sys, time
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
data = [bytes([i % 251]) * 4096 for i in range(20000)]
time.sleep(0.5)
pid = os.fork()
right = all(page == bytes([i % 251]) * 4096 for i, page in enumerate(data))
if pid == 0:
    os._exit(0 if right else 1)
assert right and os.waitpid(pid, 0)[1] == 0
print("ok", flush=True)
time.sleep(11)
"""


def test_a_supervisor_that_stands_still_holds_nobody_up(tmp_path: Path) -> None:
    """A program that is about to be adopted, and forks meanwhile, goes on and is managed: what it
    has sent to the supervisor is as good as received."""
    go = tmp_path / "go"
    with start_farmem([sys.executable, "-c", GROWS_AND_FORKS, str(go)], local=LOCAL) as job:
        supervisor = job.supervisor()
        time.sleep(1.0)  # it has joined by then
        os.kill(supervisor, signal.SIGSTOP)
        try:
            go.touch()
            job.await_out("ok", 30)
            assert job.process.wait(60) == 0
        finally:
            os.kill(supervisor, signal.SIGCONT)
        result = job.finish(30)
        assert result.stdout == b"ok\n"
        assert_paged(result.stats, 1000, 1000)
