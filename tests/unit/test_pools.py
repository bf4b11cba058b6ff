"""`--pool` as people write it, and the file of a `file:` pool: nobody's data is ever at risk."""

import errno
import fcntl
import os
import resource
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farmem import pools
from farmem.errors import FarmemError
from farmem.poolfile import PoolFile
from farmem.pools import EXTENT_BYTES, FILE_BYTES_DEFAULT_MAX, Pool, file_system_of, parse_pool
from tests.harness import free_space_folder

DATA = b"somebody's data"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on a disk: /tmp may lie in memory."""
    if file_system_of(str(free_space_folder())) in ("tmpfs", "ramfs"):
        pytest.skip("this checkout lies in memory")
    with tempfile.TemporaryDirectory(dir=free_space_folder()) as name:
        yield Path(name)


# ---- spelling


def test_a_folder_gives_most_of_what_is_free_there(folder: Path) -> None:
    pool = parse_pool(f"file:{folder}")
    there = os.statvfs(folder)
    assert pool.path == str(folder)
    assert pool.capacity_bytes % EXTENT_BYTES == 0
    assert 0 < pool.capacity_bytes < there.f_bavail * there.f_frsize
    assert pool.capacity_bytes <= FILE_BYTES_DEFAULT_MAX


def test_the_users_limit_on_files_bounds_the_default(folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, before[1]))
    try:
        assert parse_pool(f"file:{folder}").capacity_bytes <= 64 << 20
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["a", "a:b", "8G:x", "a?size=4M", "a%20b", "ü,=;"])
def test_a_size_stands_before_the_path_which_can_hold_anything(folder: Path, name: str) -> None:
    assert parse_pool(f"file:{folder}/{name}").path == f"{folder}/{name}"
    pool = parse_pool(f"file:5M:{folder}/{name}")
    assert (pool.path, pool.capacity_bytes) == (f"{folder}/{name}", 4 << 20)


def test_a_path_may_be_relative_if_that_shows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert parse_pool("file:.").path == str(folder)
    assert parse_pool("file:4M:./8G:x").path == str(folder / "8G:x")


def test_a_link_is_followed(folder: Path) -> None:
    (folder / "link").symlink_to(folder)
    assert parse_pool(f"file:{folder}/link").path == str(folder)


@pytest.mark.parametrize(
    ("url", "named", "hint"),
    [
        ("file:/\0", "has no zero bytes", "file:/var/tmp"),
        ("file:", "names no path", "file:/var/tmp"),
        ("file:8G:", "names no path", "file:/var/tmp"),
        ("file:8G", "begins with neither", "file:./8G"),
        ("file:pool", "begins with neither", "file:./pool"),
        ("file:8G:pool", "begins with neither", "file:./pool"),
        ("file::/", "is not a size", "4G"),
        ("file:5Q:/", "is not a size", "4G"),
        ("file:1M:/", "are the least", "file:SIZE:PATH"),
        ("file:/nosuch/folder/pool", "no folder", "file:/var/tmp"),
        ("file:/etc/passwd/pool", "no folder", "file:/var/tmp"),
        ("file:/etc/passwd/", "is not a folder", "file:/var/tmp"),
        ("file", "there is no pool", "file:PATH"),
        ("files:/var/tmp", "there is no pool", "file:PATH"),
    ],
)
def test_a_bad_file_pool_is_refused_with_a_hint(url: str, named: str, hint: str) -> None:
    with pytest.raises(FarmemError) as caught:
        parse_pool(url)
    assert named in caught.value.what
    assert hint in caught.value.hint


@given(st.text(max_size=30))
def test_any_text_is_a_pool_or_a_farmem_error(text: str) -> None:
    for url in (text, f"file:{text}", f"mem:{text}"):
        try:
            assert parse_pool(url).capacity_bytes > 0
        except FarmemError as error:
            assert error.hint


def test_a_folder_in_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "file_system_of", lambda _: "tmpfs")
    with pytest.raises(FarmemError, match="lies in memory"):
        parse_pool(f"file:{folder}")


def test_the_kind_of_a_file_system_is_known() -> None:
    assert file_system_of("/proc") == "proc"


# ---- the file


def used_bytes(file: PoolFile) -> int:
    return os.fstat(file.fd).st_blocks * 512


def test_a_folder_gets_a_file_without_a_name(folder: Path) -> None:
    file = PoolFile(Pool("", 1 << 30, str(folder)))
    assert list(folder.iterdir()) == []
    assert os.fstat(file.fd).st_size == 1 << 30
    assert stat.S_IMODE(os.fstat(file.fd).st_mode) == 0o600
    assert used_bytes(file) == 0
    assert fcntl.fcntl(file.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    file.discard()
    file.discard()
    assert list(folder.iterdir()) == []


def test_where_there_are_no_unnamed_files_the_name_goes_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", without)
    file = PoolFile(Pool("", 1 << 30, str(folder)))
    assert os.fstat(file.fd).st_nlink == 0
    assert list(folder.iterdir()) == []
    file.discard()


@pytest.mark.parametrize("direct", [True, False])
def test_direct_io_is_used_where_it_works_and_wanted(folder: Path, direct: bool) -> None:
    file = PoolFile(Pool("", 1 << 30, str(folder)), direct)
    assert file.is_direct == bool(fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT)
    assert direct or not file.is_direct
    file.discard()


def test_a_new_file_is_made_and_removed(folder: Path) -> None:
    path = folder / "pool"
    file = PoolFile(Pool("", 1 << 30, str(path)))
    assert path.stat().st_size == 1 << 30
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    file.discard()
    assert not path.exists()


def test_what_has_taken_the_files_place_is_left_alone(folder: Path) -> None:
    path = folder / "pool"
    file = PoolFile(Pool("", 1 << 30, str(path)))
    path.rename(folder / "elsewhere")
    path.write_bytes(DATA)
    file.discard()
    assert path.read_bytes() == DATA


def test_an_empty_file_is_used_and_kept_and_emptied(folder: Path) -> None:
    path = folder / "pool"
    path.touch(0o640)
    file = PoolFile(Pool("", 1 << 30, str(path)))
    assert path.stat().st_size == 1 << 30
    file.discard()
    assert path.stat().st_size == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_that_holds_anything_is_refused_and_untouched(folder: Path) -> None:
    path = folder / "pool"
    path.write_bytes(DATA)
    before = path.stat()
    with pytest.raises(FarmemError, match="would overwrite") as caught:
        PoolFile(Pool("", 1 << 30, str(path)))
    assert "remove it" in caught.value.hint
    assert path.read_bytes() == DATA
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_file_in_use_is_refused_and_untouched(folder: Path) -> None:
    path = folder / "pool"
    first = PoolFile(Pool("", 1 << 30, str(path)))
    os.pwrite(first.fd, b"x" * 4096, 0) if not first.is_direct else None
    with pytest.raises(FarmemError, match="in use by another job"):
        PoolFile(Pool("", 1 << 20, str(path)))
    assert path.stat().st_size == 1 << 30
    first.discard()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "dangling link"])
def test_what_is_no_file_is_refused_without_waiting(folder: Path, kind: str) -> None:
    path = folder / "pool"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    else:
        path.symlink_to(folder / "nowhere")
    with pytest.raises(FarmemError):
        PoolFile(Pool("", 1 << 30, str(path)))
    assert not (folder / "nowhere").exists()


def test_a_size_that_the_file_system_refuses_is_an_error_and_leaves_nothing(folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, before[1]))
    try:
        with pytest.raises(FarmemError, match="can't be opened") as caught:
            PoolFile(Pool("file:x", 1 << 30, str(folder / "pool")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "smaller" in caught.value.hint
    assert list(folder.iterdir()) == []
