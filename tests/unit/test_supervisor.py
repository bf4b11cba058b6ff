"""The supervisor against an engine played in Python (fake_engine.py).

Each test runs a script as a job's command.  What is waited for is a state (a file that
appears, a pipe that ends), never a time; the limits are for a supervisor that hangs.
"""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 30


class JobRun:
    """A job of a fake engine, its output, and the statistics it left."""

    def __init__(self, folder: Path) -> None:
        self.stats_path = folder / "stats.json"

    def start(self, script: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        pass_fds = options.pop("pass_fds", ())
        options.setdefault("stats_path", str(self.stats_path))
        module = [sys.executable, "-m", "tests.unit.fake_engine"]
        return subprocess.Popen(
            [*module, json.dumps(options), script, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
        )

    def run(self, script: str, *arguments: str, **options: Any) -> str:
        """Run to the end, the supervisor's included; stderr."""
        process = self.start(script, *arguments, **options)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, err.decode()
        assert out == b"", out.decode()
        return err.decode()

    def stats(self) -> dict[str, Any]:
        wait_until(self.stats_path.exists)
        loaded: dict[str, Any] = json.loads(self.stats_path.read_text())
        return loaded


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def reads_end(fd: int, wait_seconds: float = LIMIT_SECONDS) -> bool:
    """Whether a pipe's last writer goes (and nothing was written)."""
    ready, _, _ = select.select([fd], [], [], wait_seconds)
    return bool(ready) and os.read(fd, 1) == b""


@pytest.fixture
def job(tmp_path: Path) -> JobRun:
    return JobRun(tmp_path)


def test_a_hello_is_welcomed_with_a_live_slot_and_the_jobs_memory(job: JobRun) -> None:
    job.run(
        "e = Engine().hello()\n"
        "assert e.control.magic == lib.FM_CONTROL_MAGIC\n"
        "assert e.control.budget_bytes == 64 << 20 and e.control.pool_bytes == 64 << 20\n"
        "assert e.proc.state == lib.FM_PROC_LIVE and e.proc.pid == os.getpid()\n"
        "assert any(bytes(e.control.secret))\n"
    )
    stats = job.stats()
    assert stats["processes"] == 1
    assert stats["processes_adopted"] == 0
    assert stats["pages_evicted"] == 0


@pytest.mark.parametrize("wrong", ["token=bytes(16)", "version=99"])
def test_a_stranger_is_refused(job: JobRun, wrong: str) -> None:
    job.run(
        f"e = Engine(); e.send(lib.FM_WIRE_HELLO, {wrong})\n"
        "wire, fds = e.receive()\n"
        "assert wire.kind == lib.FM_WIRE_REFUSED and not fds\n"
    )
    assert job.stats()["processes"] == 0


@pytest.mark.parametrize(
    "rubbish",
    [
        "e.sock.send(b'hello')",
        "e.send(77)",
        "e.send(lib.FM_WIRE_HELLO, magic=1)",
        "e.adopt_early()",
    ],
)
def test_rubbish_is_cut_off_and_the_job_goes_on(job: JobRun, rubbish: str) -> None:
    job.run(
        "e = Engine()\n"
        "e.adopt_early = lambda: e.send(lib.FM_WIRE_HOLD, fds=(os.pipe()[1],))\n"
        f"{rubbish}\n"
        "assert e.receive()[0] is None\n"
        "Engine().hello()\n"
    )
    assert job.stats()["processes"] == 1


def test_counters_are_summed_and_the_peak_is_the_jobs(job: JobRun) -> None:
    job.run(
        "e = Engine().hello()\n"
        "e.proc.counters.pages_evicted = 5\n"
        "e.proc.local_bytes = 100 << 20; e.proc.counters.peak_local_bytes = 100 << 20\n"
        "if os.fork() == 0:\n"
        "    e = Engine().hello()\n"
        "    e.proc.counters.pages_evicted = 7; e.proc.local_bytes = 60 << 20\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    stats = job.stats()
    assert stats["pages_evicted"] == 12
    assert stats["peak_local_bytes"] == 160 << 20
    assert stats["processes"] == 2
    assert stats["exit_known"] is False


def test_a_summary_is_printed_when_pages_were_evicted_unless_quiet(job: JobRun) -> None:
    script = "e = Engine().hello(); e.proc.counters.pages_evicted = 5\n"
    loud = job.run(script)
    assert "5 pages evicted" in loud
    assert "64.0 MiB budget" in loud
    assert job.run(script, quiet=True) == ""
    assert job.run("Engine().hello()\n") == ""


def test_a_reserved_slot_is_bound_by_the_child_that_names_it(job: JobRun) -> None:
    job.run(
        "e = Engine().hello()\n"
        "e.control.procs[9].state = lib.FM_PROC_FORKING; e.control.procs[9].parent_slot = e.slot\n"
        "if os.fork() == 0:\n"
        "    child = Engine().hello(9)\n"
        "    assert child.slot == 9 and child.proc.state == lib.FM_PROC_LIVE\n"
        "    assert child.proc.pid == os.getpid()\n"
        "    os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n"
        "late = Engine(); late.send(lib.FM_WIRE_HELLO, 9)\n"
        "assert late.receive()[0].kind == lib.FM_WIRE_REFUSED\n"
    )


def test_a_slot_reserved_by_a_parent_that_died_does_not_keep_the_job(job: JobRun) -> None:
    job.run(
        "e = Engine().hello()\n"
        "e.control.procs[9].state = lib.FM_PROC_FORKING; e.control.procs[9].parent_slot = e.slot\n"
    )
    assert job.stats()["processes"] == 1


def test_a_slot_reserved_by_a_parent_that_died_is_free_again(job: JobRun) -> None:
    """The command lives on: the job's end is not what frees it."""
    job.run(
        "e = Engine().hello()\n"
        "if os.fork() == 0:\n"
        "    child = Engine().hello()\n"
        "    proc = child.control.procs[9]\n"
        "    proc.parent_slot = child.slot; proc.counters.forks = 1\n"
        "    proc.state = lib.FM_PROC_FORKING\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "while e.control.procs[9].state != lib.FM_PROC_FREE: time.sleep(0.01)\n"
        "assert e.control.procs[9].parent_slot == 0\n"
    )
    assert job.stats()["forks"] == 1


def test_a_slot_is_empty_when_it_is_given_out_again(job: JobRun) -> None:
    job.run(
        "e = Engine().hello()\n"
        "for i in range(3):\n"
        "    if os.fork() == 0:\n"
        "        child = Engine().hello()\n"
        "        assert child.slot == e.slot + 1, child.slot\n"
        "        assert child.proc.counters.pages_stored == 0 and child.proc.local_bytes == 0\n"
        "        child.proc.counters.pages_stored = 1; child.proc.local_bytes = 4096\n"
        "        os._exit(0)\n"
        "    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n"
        "    while e.control.procs[e.slot + 1].state != lib.FM_PROC_FREE: time.sleep(0.01)\n"
    )
    assert job.stats()["pages_stored"] == 3


def test_a_duplicate_is_held_until_the_process_has_gone(job: JobRun) -> None:
    """The connection is closed early: only the death may release it."""
    job.run(
        "e = Engine().hello()\n"
        "if os.fork() == 0:\n"
        "    e = Engine().hello(); end = e.adopt(); e.sock.close()\n"
        "    import select\n"
        "    time.sleep(0.2)\n"
        "    os._exit(0 if select.select([end], [], [], 0)[0] == [] else 1)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n"
    )
    assert job.stats()["processes_adopted"] == 1


def test_a_duplicate_is_released_when_the_process_has_gone(job: JobRun) -> None:
    """A second process stays, so that the supervisor does too."""
    job.run(
        "e = Engine().hello()\n"
        "r, w = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    e = Engine().hello(); e.send(lib.FM_WIRE_HOLD, e.slot, (w,))\n"
        "    os._exit(0)\n"
        "os.close(w); os.wait()\n"
        "assert os.read(r, 1) == b''\n"
    )


def test_the_defect_no_duplicate_lets_go_at_once(job: JobRun) -> None:
    """The death tests rely on it: with the defect they must see zeros."""
    job.run("e = Engine().hello(); assert os.read(e.adopt(), 1) == b''\n", defects=1)


def test_exec_releases_the_old_image_and_keeps_its_counters(job: JobRun) -> None:
    job.run(
        "e = Engine().hello()\n"
        "if len(sys.argv) == 1:\n"
        "    end = e.adopt(); os.set_inheritable(end, True)\n"
        "    e.proc.counters.pages_fetched = 3\n"
        "    code = open('/proc/self/cmdline').read().split('\\0')[2]\n"
        "    os.execv(sys.executable, [sys.executable, '-c', code, str(end)])\n"
        "assert os.read(int(sys.argv[1]), 1) == b''\n"
        "assert e.proc.counters.pages_fetched == 0\n"
        "e.proc.counters.pages_fetched = 4\n"
    )
    stats = job.stats()
    assert stats["pages_fetched"] == 7
    assert stats["processes"] == 1


def test_messages_are_printed_with_their_pid_and_quiet_hides_the_small_ones(job: JobRun) -> None:
    script = (
        "e = Engine().hello()\n"
        "e.say('something small', lib.FM_LEVEL_INFO); e.say('something bad', lib.FM_LEVEL_ERROR)\n"
    )
    loud = job.run(script).splitlines()
    assert [line.partition("] ")[2] for line in loud] == ["something small", "something bad"]
    assert all(line.startswith("farmem: [") for line in loud)
    assert [line.partition("] ")[2] for line in job.run(script, quiet=True).splitlines()] == [
        "something bad"
    ]


def test_a_full_stderr_does_not_stop_the_supervisor(job: JobRun) -> None:
    """Nobody reads stderr: hellos are answered and the statistics are written all the same."""
    process = job.start(
        "e = Engine().hello()\n"
        "for i in range(4000):\n"
        "    e.say('x' * 200, lib.FM_LEVEL_ERROR)\n"
        "    if i % 100 == 0: time.sleep(0.03); Engine().sock.close()\n"
        "if os.fork() == 0: Engine().hello(); os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n"
    )
    assert process.wait(LIMIT_SECONDS) == 0
    assert job.stats()["processes"] == 2
    process.communicate(timeout=LIMIT_SECONDS)


def test_a_daemon_does_not_keep_the_callers_stderr(job: JobRun) -> None:
    """The daemon closes what it inherited; the supervisor must not hold stderr for it."""
    keep, hold = os.pipe()
    process = job.start(
        "e = Engine().hello()\n"
        "ready, done = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); e = Engine().hello(); os.write(done, b'x')\n"
        "    for fd in (0, 1, 2): os.close(fd)\n"
        "    os.read(int(sys.argv[1]), 1)\n"
        "    e.proc.counters.pages_stored = 42\n"
        "    os._exit(0)\n"
        "os.read(ready, 1)\n",
        str(keep),
        pass_fds=(keep,),
    )
    os.close(keep)
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert not job.stats_path.exists()
    os.close(hold)
    assert job.stats()["pages_stored"] == 42


def test_the_supervisor_holds_no_descriptor_of_the_caller_but_stderr(job: JobRun) -> None:
    """The command closes a pipe that it was given and lives on: the reader must see the end."""
    read_end, write_end = os.pipe()
    process = job.start(
        "e = Engine().hello()\nos.close(int(sys.argv[1])); os.close(1)\ntime.sleep(600)\n",
        str(write_end),
        pass_fds=(write_end,),
    )
    os.close(write_end)
    try:
        assert reads_end(read_end)
        assert process.stdout is not None
        assert reads_end(process.stdout.fileno())
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_SECONDS)
        os.close(read_end)
    assert job.stats()["processes"] == 1


def test_the_command_has_no_child_and_no_descriptor_of_ours(job: JobRun) -> None:
    job.run(
        "children = open(f'/proc/self/task/{os.getpid()}/children').read()\n"
        "fds = [n for n in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}')]\n"
        "assert children == '', children\n"
        "assert sorted(fds) == ['0', '1', '2'], fds\n"
    )


def supervisors_of(name: str) -> list[int]:
    """The processes called farmem-job that listen under a job's name."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/comm").read_text().strip()
            words = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if command == "farmem-job" and name in words:
            found.append(int(pid))
    return found


def test_signals_that_stop_a_job_do_not_stop_its_supervisor(job: JobRun, tmp_path: Path) -> None:
    """Its own session, and SIGTERM ignored: it outlives the command, then goes by itself."""
    mark = str(tmp_path)
    process = job.start("Engine().hello()\nos.close(1)\ntime.sleep(600)\n", mark)
    assert process.stdout is not None
    assert reads_end(process.stdout.fileno())
    wait_until(lambda: len(supervisors_of(mark)) == 1)
    [supervisor] = supervisors_of(mark)
    assert os.getsid(supervisor) != os.getsid(process.pid)
    for number in (1, 2, 15):
        os.kill(supervisor, number)
    process.kill()
    process.communicate(timeout=LIMIT_SECONDS)
    assert job.stats()["processes"] == 1
    wait_until(lambda: supervisors_of(mark) == [])


def test_a_command_that_could_not_start_leaves_no_statistics(job: JobRun, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0\0\0\0 not a program")
    broken.chmod(0o755)
    process = job.start("", str(tmp_path), command=[str(broken)])
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode != 0
    wait_until(lambda: supervisors_of(str(tmp_path)) == [])
    assert not job.stats_path.exists()


def test_a_statistics_file_that_can_no_longer_be_written_is_reported(
    job: JobRun, tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    path = str(folder / "stats.json")
    err = job.run(f"Engine().hello(); os.rmdir({str(folder)!r})\n", stats_path=path)
    assert "could not be written" in err
