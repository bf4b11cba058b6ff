"""fork is never silently wrong: children see what their parent had, each then has its own.

Run as root, where the kernel tells of forks, and as an ordinary user whose group may open
/dev/userfaultfd, where it does not and only the fork handlers help. A parent that dies
must not take its children's pages along. Two ways around the handlers are tried as well:
the raw clone system call (right bytes or death), and every way to start another program.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    FARMEM,
    Result,
    as_user,
    assert_defect_noticed,
    assert_ok,
    assert_paged,
    compile_c,
    exclusive,
    public_copy,
    run_farmem,
    start_farmem,
)

pytestmark = [pytest.mark.safety, pytest.mark.uffd]
LOCAL = "32M"
DEVICE = Path("/dev/userfaultfd")
DEVICE_GROUP = 64123  # a number is enough: the group needs no name
MODES = ["child", "double", "grand", "many", "malloc", "thread", "grown"]


@pytest.fixture(scope="module")
def group_of_device() -> Iterator[list[int]]:
    """/dev/userfaultfd is for root and a group, as an administrator would set it up."""
    if os.geteuid() != 0:
        pytest.skip("only root can lend /dev/userfaultfd to a group")
    if not DEVICE.exists():
        pytest.skip("there is no /dev/userfaultfd")
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed (util-linux)")
    words = [*as_user("nobody", []), str(FARMEM), "--help"]
    reach = subprocess.run(words, capture_output=True, check=False)
    if reach.returncode != 0:
        pytest.skip("other users can't run farmem from this checkout")
    with exclusive("userfaultfd-device"):
        before = DEVICE.stat()
        os.chown(DEVICE, before.st_uid, DEVICE_GROUP)
        DEVICE.chmod(0o660)
        yield [DEVICE_GROUP]
        os.chown(DEVICE, before.st_uid, before.st_gid)
        DEVICE.chmod(before.st_mode & 0o7777)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="farmem-test-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


def assert_forked(result: Result) -> None:
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["forks"] >= 1, result.stats


@pytest.mark.parametrize("mode", MODES)
def test_fork(mode: str) -> None:
    assert_forked(run_farmem([compile_c("forks"), mode], local=LOCAL))


@pytest.mark.root
@pytest.mark.parametrize("mode", MODES)
def test_fork_as_ordinary_user(mode: str, group_of_device: list[int], public_folder: Path) -> None:
    program = public_copy(compile_c("forks"), public_folder)
    result = run_farmem(
        [program, mode], local=LOCAL, user="nobody", groups=group_of_device, cwd=public_folder
    )
    assert_forked(result)


@pytest.mark.parametrize("mode", ["child", "grand", "thread"])
def test_fork_notices(mode: str) -> None:
    assert_defect_noticed([compile_c("forks"), mode], "ignore_fork", local=LOCAL)


@pytest.mark.root
def test_fork_as_ordinary_user_notices(group_of_device: list[int], public_folder: Path) -> None:
    program = public_copy(compile_c("forks"), public_folder)
    assert_defect_noticed(
        [program, "child"],
        "ignore_fork",
        local=LOCAL,
        user="nobody",
        groups=group_of_device,
        cwd=public_folder,
    )


def daemon_verdict(folder: Path, defects: list[str], timeout: float, **options: object) -> bool:
    """Runs the daemon; true when it has found all its memory right."""
    verdict = folder / "verdict"
    program = public_copy(compile_c("forks"), folder)
    with start_farmem(
        [program, "daemon"],
        local=LOCAL,
        defects=defects,
        env={"FORKS_VERDICT": str(verdict)},
        cwd=folder,
        **options,  # type: ignore[arg-type]
    ) as job:
        job.process.wait(60)
        assert job.process.returncode == 0, job.process.returncode
        end = time.monotonic() + timeout
        while time.monotonic() < end and not verdict.exists() and job.job_processes():
            time.sleep(0.05)
        return verdict.exists()


def test_daemon_whose_parent_dies(public_folder: Path) -> None:
    assert daemon_verdict(public_folder, [], 60)


@pytest.mark.root
def test_daemon_as_ordinary_user(group_of_device: list[int], public_folder: Path) -> None:
    assert daemon_verdict(public_folder, [], 60, user="nobody", groups=group_of_device)


def test_daemon_notices(public_folder: Path) -> None:
    seen = []
    for attempt in range(3):
        folder = public_folder / str(attempt)
        folder.mkdir()
        seen.append(daemon_verdict(folder, ["ignore_fork"], 15))
    assert not all(seen)


def test_starting_other_programs() -> None:
    result = run_farmem([compile_c("spawns")], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


PAST_FORK = ["_Fork", "clone", "syscall-fork", "syscall-clone", "syscall-clone3"]


@pytest.mark.parametrize("way", PAST_FORK)
def test_children_made_past_fork(way: str) -> None:
    result = run_farmem([compile_c("rawfork"), way], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.root
@pytest.mark.parametrize("way", [*PAST_FORK, "inline"])
def test_children_made_past_fork_as_ordinary_user(
    way: str, group_of_device: list[int], public_folder: Path
) -> None:
    program = public_copy(compile_c("rawfork"), public_folder)
    result = run_farmem(
        [program, way], local=LOCAL, user="nobody", groups=group_of_device, cwd=public_folder
    )
    assert_ok(result)


def test_a_child_by_an_instruction_is_right_or_dies() -> None:
    result = run_farmem([compile_c("rawfork"), "inline"], local=LOCAL)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("way", ["_Fork", "inline"])
def test_children_made_past_fork_notice(way: str) -> None:
    assert_defect_noticed([compile_c("rawfork"), way], "ignore_fork", local=LOCAL)


def test_a_shell_pipeline_of_forks() -> None:
    """Processes that are small never fork anything of ours; the job still counts them."""
    shell = shutil.which("sh")
    assert shell is not None
    script = "for i in 1 2 3 4 5; do (echo $i | cat | tr 1-5 a-e); done"
    result = run_farmem([shell, "-c", script], local=LOCAL)
    assert result.stdout == b"a\nb\nc\nd\ne\n"


def test_a_child_that_comes_late(tmp_path: Path) -> None:
    """Its parent, the command, has long ended when it takes its first step: it is managed all the
    same, and the job is not over before it has gone."""
    with start_farmem([compile_c("slow_child"), str(tmp_path)], local=LOCAL) as job:
        assert job.process.wait(30) == 0
        child = int((tmp_path / "child").read_text())
        time.sleep(0.5)  # longer than the supervisor waits where it sees nobody
        os.kill(child, signal.SIGCONT)
        result = job.finish()
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["processes_adopted"] == 1, result.describe()
