"""The pool `file:`: right bytes by every way to transfer, and when the file fails in every way.

Space runs out, reads and writes fail, somebody cuts the file short: a page stays local, or the
program ends by SIGBUS and is told why. Small file systems are made on loop devices, whose
backing file lies in memory, so that a device can be made to fail for real.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import (
    Result,
    assert_ok,
    assert_paged,
    compile_c,
    free_space_folder,
    run_farmem,
    start_farmem,
)

pytestmark = [pytest.mark.safety, pytest.mark.uffd]
LOCAL = "48M"
WAYS = ["uring", "threads"]
MIB = 1 << 20
LIMIT_S = 60


def has_io_uring() -> bool:
    text = Path("/proc/sys/kernel/io_uring_disabled")
    forbidden = int(text.read_text()) if text.exists() else 0
    return forbidden == 0 or (forbidden == 1 and os.geteuid() == 0)


def by_way(way: str) -> dict[str, str]:
    """The environment that forces a way to transfer; a skip where it can't be had."""
    if way.startswith("uring") and not has_io_uring():
        pytest.skip("io_uring is switched off here (kernel.io_uring_disabled)")
    return {"FARMEM_TEST_FILE_IO": way}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on a disk: /tmp may lie in memory."""
    with tempfile.TemporaryDirectory(dir=free_space_folder()) as name:
        yield Path(name)


def pool(path: Path, size: str = "") -> tuple[str, str]:
    return ("--pool", f"file:{size}:{path}" if size else f"file:{path}")


def assert_went_by(result: Result, way: str) -> None:
    """Counted, not believed: every transfer by the way that was asked for."""
    assert result.stats is not None
    uring, threads = result.stats["transfers_uring"], result.stats["transfers_threads"]
    assert (uring > 0, threads > 0) == (way.startswith("uring"), not way.startswith("uring"))
    assert result.stats["pool_direct_io"] is (not way.endswith("buffered"))


def wait_until(what: Callable[[], object], why: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < end, why
        time.sleep(0.02)


def used_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


# ---- right bytes


@pytest.mark.parametrize("evict", [None, "copy"])
@pytest.mark.parametrize("way", [*WAYS, "uring,buffered", "threads,buffered"])
def test_every_word(way: str, evict: str | None, folder: Path) -> None:
    result = run_farmem(
        [compile_c("verify"), "4", "96", "8"],
        local=LOCAL,
        evict=evict,
        env=by_way(way),
        options=pool(folder),
    )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert_went_by(result, way)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", ["child", "grand", "many", "malloc", "thread"])
@pytest.mark.parametrize("way", WAYS)
def test_fork(way: str, mode: str, folder: Path) -> None:
    result = run_farmem(
        [compile_c("forks"), mode], local="32M", env=by_way(way), options=pool(folder)
    )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["forks"] >= 1, result.stats
    assert_went_by(result, way)


@pytest.mark.parametrize("way", WAYS)
def test_fork_after_the_supervisor_has_died(way: str, folder: Path) -> None:
    """Nobody is left to hand the file over: the child takes it from its parent, or it dies."""
    program = compile_c("forks")
    with start_farmem(
        [program, "thread", "5"], local="32M", env=by_way(way), options=pool(folder)
    ) as job:
        job.program(program)
        time.sleep(1.0)
        os.kill(job.supervisor(), signal.SIGKILL)
        result = job.finish(LIMIT_S, wait_stats_s=0)
        assert not result.timed_out, result.describe()
        assert b"wrong byte" not in result.stderr, result.describe()
        assert job.gone(20)


@pytest.mark.move
@pytest.mark.parametrize("program", ["uring_fixed", "direct_io"])
def test_a_program_that_does_the_same_itself(program: str, folder: Path) -> None:
    """Its pins and its rings are its own: they are seen, and ours are not taken for them."""
    result = run_farmem(
        [compile_c(program), str(free_space_folder())], local="32M", options=pool(folder)
    )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


# ---- reads and writes that fail


@pytest.mark.parametrize("way", WAYS)
def test_transfers_that_fail_now_and_then(way: str, folder: Path) -> None:
    result = run_farmem(
        [compile_c("verify")],
        local=LOCAL,
        env=by_way(way),
        options=pool(folder),
        filters=["error:fetch=0.01,store=0.2,seed=4"],
        check=False,
    )
    if result.returncode == 0:
        assert_ok(result)
    else:
        assert result.returncode == -signal.SIGBUS, result.describe()
        assert b"lost" in result.stderr, result.describe()
    assert result.stats is not None and result.stats["store_errors"] >= 1, result.describe()


@pytest.mark.parametrize("backend", ["mem", "file"])
def test_a_pool_that_takes_nothing_slows_nobody_down(backend: str, folder: Path) -> None:
    """Every store fails, so no page can leave: the program goes on over its budget, told once."""
    result = run_farmem(
        [compile_c("verify"), "4", "96", "1"],
        local=LOCAL,
        options=pool(folder) if backend == "file" else (),
        filters=["error:store=1"],
    )
    assert_ok(result)
    assert result.stats is not None and result.stats["store_errors"] >= 1, result.describe()
    assert result.stats["pages_stored"] >= 1 and result.stats["pages_fetched"] == 0
    assert result.stderr.count(b"could not store") == 1, result.describe()


# ---- somebody cuts the file short


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left_bytes", [0, 8 * MIB])
def test_a_file_that_is_cut_short(way: str, left_bytes: int, folder: Path) -> None:
    """What was beyond is lost, and a page of it is touched soon: SIGBUS, and the reason told."""
    path = folder / "pool"
    with start_farmem(
        [compile_c("endless"), str(folder / "stop")],
        local="32M",
        env=by_way(way),
        options=pool(path, "1G"),
    ) as job:
        job.await_out("ready")
        os.truncate(path, left_bytes)
        result = job.finish(LIMIT_S)
    assert result.returncode == -signal.SIGBUS, result.describe()
    assert b"cut short" in result.stderr and b"page lost" in result.stderr, result.describe()
    assert not path.exists()


# ---- space


@contextlib.contextmanager
def mounted(image: Path, size_bytes: int, folder: Path) -> Iterator[Path]:
    """A small file system on a loop device, made anew."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (e2fsprogs)")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    # Without a journal: when its device fails, the file system goes on as long as it can.
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", image], check=True)
    done = subprocess.run(
        ["mount", "-o", "loop,nodiscard", image, folder],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"a loop device can't be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        wait_until(
            lambda: subprocess.run(["umount", folder], check=False, stderr=-3).returncode == 0,
            "the file system stays busy",
        )


@pytest.mark.root
@pytest.mark.parametrize("way", WAYS)
def test_a_file_system_that_fills_up(way: str, folder: Path) -> None:
    """64 MiB for what is left of 128 MiB: all of it is used, the rest stays, told once."""
    (folder / "mount").mkdir()
    with mounted(folder / "image", 64 * MIB, folder / "mount") as place:
        result = run_farmem(
            [compile_c("verify"), "4", "128", "2"],
            local="32M",
            env=by_way(way),
            options=pool(place, "1G"),
        )
        assert_ok(result)
        assert_paged(result.stats, 8000, 1000)
        assert_went_by(result, way)
        assert result.stderr.count(b"no space left") == 1, result.describe()
        assert result.stats is not None
        assert result.stats["pool_peak_bytes"] > 32 * MIB, result.describe()
        assert result.stats["store_errors"] == 0, "space was not granted before pages left"


@pytest.mark.root
def test_a_file_system_without_room_is_refused_at_the_start(folder: Path) -> None:
    (folder / "mount").mkdir()
    with mounted(folder / "image", 8 * MIB, folder / "mount") as place:
        with contextlib.suppress(OSError), (place / "filler").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        result = run_farmem(["true"], local="32M", options=pool(place, "1G"), check=False)
    assert result.returncode == 125, result.describe()
    assert b"No space left" in result.stderr and b"make room" in result.stderr


@pytest.mark.root
@pytest.mark.parametrize("way", WAYS)
def test_a_device_that_fails(way: str, folder: Path) -> None:
    """What is behind the loop device is cut off: reads give EIO, or zeros."""
    (folder / "mount").mkdir()
    with (
        mounted(folder / "image", 256 * MIB, folder / "mount") as place,
        start_farmem(
            [compile_c("endless"), str(folder / "stop")],
            local="32M",
            env=by_way(way),
            options=pool(place),
        ) as job,
    ):
        job.await_out("ready")
        os.truncate(folder / "image", 4 * MIB)
        result = job.finish(LIMIT_S)
    assert result.returncode == -signal.SIGBUS, result.describe()
    assert b"page lost" in result.stderr and b"wrong byte" not in result.stderr


@pytest.mark.root
@pytest.mark.parametrize("way", WAYS)
def test_a_device_with_less_room_than_it_says(way: str, folder: Path) -> None:
    """The memory behind the loop device has no room: most writes fail, and some are said to
    have been done and were not. Pages stay, or are found out to be lost."""
    memory, place = folder / "memory", folder / "mount"
    memory.mkdir()
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48M", "tmpfs", memory], check=True)
    try:
        with mounted(memory / "image", 256 * MIB, place):
            result = run_farmem(
                [compile_c("verify"), "4", "128", "4"],
                local="32M",
                env=by_way(way),
                options=pool(place),
                check=False,
            )
    finally:
        subprocess.run(["umount", memory], check=True)
    if result.returncode == 0:
        assert_ok(result)
    else:
        assert result.returncode == -signal.SIGBUS, result.describe()
        assert b"page lost" in result.stderr, result.describe()
    assert result.stats is not None and result.stats["store_errors"] >= 1, result.describe()


@pytest.mark.parametrize("way", WAYS)
def test_space_is_given_back(way: str, folder: Path) -> None:
    """What the program throws away, and what a child had that was killed, leaves the file."""
    path = folder / "pool"
    with start_farmem(
        [compile_c("gives_back"), str(folder)],
        local="32M",
        env=by_way(way),
        options=pool(path, "1G"),
    ) as job:
        for step in ("away", "discarded", "unmapped", "child", "killed"):
            job.await_out(step)
            if step in ("away", "child"):
                wait_until(lambda: used_bytes(path) >= 64 * MIB, step)
            else:
                most = 66 * MIB if step == "discarded" else 8 * MIB
                wait_until(lambda most=most: used_bytes(path) <= most, step)
            (folder / step).touch()
        assert_ok(job.finish(LIMIT_S))


# ---- nothing is left behind


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_named_file_goes_with_the_job(end: str, folder: Path) -> None:
    path = folder / "pool"
    with start_farmem(
        [compile_c("endless"), str(folder / "stop")], local="32M", options=pool(path)
    ) as job:
        job.await_out("ready")
        assert path.exists()
        if end == "stop":
            (folder / "stop").touch()
            assert_ok(job.finish(LIMIT_S))
        else:
            os.kill(job.process.pid, signal.SIGKILL)
            assert job.finish(LIMIT_S).returncode == -signal.SIGKILL
        wait_until(lambda: not path.exists(), "the pool's file was left behind")


@pytest.mark.parametrize("command", ["nosuch", "bad"])
def test_a_job_that_never_began_leaves_no_file(command: str, folder: Path) -> None:
    (folder / "bad").write_bytes(b"#!/nosuch/interpreter\n")
    (folder / "bad").chmod(0o755)
    result = run_farmem(
        [str(folder / command)], local="32M", options=pool(folder / "pool"), check=False
    )
    assert result.returncode == 127, result.describe()
    assert not (folder / "pool").exists()


def test_what_a_killed_supervisor_leaves_is_never_overwritten(folder: Path) -> None:
    """The one thing that leaves a named file behind; the next job says what to do about it."""
    path = folder / "pool"
    with start_farmem(
        [compile_c("endless"), str(folder / "stop")], local="32M", options=pool(path)
    ) as job:
        job.await_out("ready")
        in_use = run_farmem(["true"], local="32M", options=pool(path), check=False)
        assert in_use.returncode == 125 and b"in use by another job" in in_use.stderr
        os.kill(job.supervisor(), signal.SIGKILL)
        (folder / "stop").touch()
        assert job.finish(LIMIT_S, wait_stats_s=0).returncode == 0
        assert job.gone(20)
    before = path.stat()
    again = run_farmem(["true"], local="32M", options=pool(path), check=False)
    assert again.returncode == 125 and b"remove it" in again.stderr, again.describe()
    assert path.stat().st_mtime_ns == before.st_mtime_ns
