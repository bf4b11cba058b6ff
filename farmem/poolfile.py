"""The file of a pool `file:`: made, opened, locked, given its size, and removed at the end.

Never touches a byte that somebody else wrote: a file that holds anything is refused.  A
folder gets a file without a name, which is gone when the last process that has it open is,
whatever happens.  A file with a name is removed by the supervisor if farmem made it, and
emptied if it was there, empty, before.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Callable

from farmem.errors import FarmemError
from farmem.pools import FILE_HINT, Pool, smaller_pool_hint
from farmem.sizes import format_bytes

_MODE = 0o600
_FLAGS = os.O_RDWR | os.O_CLOEXEC
_PAGE_BYTES = 4096
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_NO_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP)


class PoolFile:
    """The open file; `is_direct`: it bypasses the page cache."""

    def __init__(self, pool: Pool, want_direct: bool = True) -> None:
        self.fd = -1
        self.is_direct = False
        self._path = pool.path
        self._made = False
        self._named = not os.path.isdir(pool.path)
        try:
            self.fd = self._open_named() if self._named else _open_unnamed(pool.path)
            self.is_direct = want_direct and _goes_direct(self.fd)
            if not self.is_direct:
                _try_page(self.fd)
            os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, pool.capacity_bytes)
        except OSError as error:
            self.discard()
            raise _refused(pool, error) from error

    def _open_named(self) -> int:
        """The file that was named: ours alone, and empty."""
        try:
            fd = os.open(self._path, _FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _MODE)
            self._made = True
        except FileExistsError:
            # Opening a pipe would wait, opening a device can do anything: look first.
            _check_regular(self._path, os.stat(self._path))
            fd = os.open(self._path, _FLAGS | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            _lock(self._path, fd)
            _check_regular(self._path, os.fstat(fd))
            _check_empty(self._path, os.fstat(fd))
        except (FarmemError, OSError):
            os.close(fd)
            raise
        return fd

    def keep(self, say: Callable[[str], None]) -> None:
        """Nothing to do: a file stays."""

    def discard(self) -> None:
        """The job has ended, or never began: leave nothing behind."""
        if self.fd < 0:
            return
        with contextlib.suppress(OSError):
            if self._made and os.path.samestat(os.stat(self._path), os.fstat(self.fd)):
                os.unlink(self._path)
            elif self._named and not self._made:
                os.ftruncate(self.fd, 0)
        os.close(self.fd)
        self.fd = -1


def _open_unnamed(folder: str) -> int:
    try:
        return os.open(folder, _FLAGS | os.O_TMPFILE, _MODE)
    except OSError as error:
        if error.errno not in _NO_UNNAMED_FILES:
            raise
    # Where the file system has no such files: it loses its name after a moment.
    path = os.path.join(folder, f".farmem-{secrets.token_hex(8)}")
    fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, _MODE)
    os.unlink(path)
    return fd


def _check_regular(path: str, there: os.stat_result) -> None:
    if not stat.S_ISREG(there.st_mode):
        raise FarmemError(f"the pool file {path!r} is not a regular file", FILE_HINT)


def _check_empty(path: str, there: os.stat_result) -> None:
    if there.st_size > 0:
        raise FarmemError(
            f"{path!r} holds {format_bytes(there.st_size)}, and a pool would overwrite them",
            "name a file that is not there yet; if a job that was killed has left this one "
            "behind, remove it",
        )


def _lock(path: str, fd: int) -> None:
    """The lock is the open file's: it lives as long as any process of the job has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FarmemError(
            f"the pool file {path!r} is in use by another job",
            f"name another, or the folder, which jobs can share: file:{os.path.dirname(path)}",
        ) from error


def _goes_direct(fd: int) -> bool:
    """Let reads and writes bypass the page cache, if the file system can do that by pages."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        _try_page(fd)
    except OSError as error:
        if error.errno not in _NO_DIRECT_IO:
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def _try_page(fd: int) -> None:
    """Better now than when a program's page is in hand."""
    written = os.urandom(_PAGE_BYTES)
    with mmap.mmap(-1, _PAGE_BYTES) as page:
        page[:] = written
        done = os.pwritev(fd, [page], _PAGE_BYTES)
        page[:] = bytes(_PAGE_BYTES)
        if done != _PAGE_BYTES or os.preadv(fd, [page], _PAGE_BYTES) != _PAGE_BYTES:
            raise OSError(errno.EIO, "a page could not be written and read back")
        if page[:] != written:
            raise OSError(errno.EIO, "a page read back is not what was written")


def _refused(pool: Pool, error: OSError) -> FarmemError:
    hint = FILE_HINT
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "make room there, or name a folder on another file system"
    elif error.errno == errno.EFBIG:
        hint = smaller_pool_hint(pool)
    size = format_bytes(pool.capacity_bytes)
    return FarmemError(f"pool {pool.url!r} ({size}) can't be opened: {error.strerror}", hint)
