"""The memory that is lent: a sparse memfd, and which ranges of it are taken.

The file is far larger than what is ever lent at once, so a range is found at the first look
and practically never lent twice; its pages are the host's again when it is given back
(a punched hole), and a hole reads as zeros.  What may be promised is judged here too:
a lease is refused when this host could not back it, so that no page is ever refused.
"""

import bisect
import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

from farmem.errors import FarmemError
from farmem.pools import EXTENT_BYTES, host_memory_bytes
from farmem.sizes import format_bytes

SPACE_BYTES = 1 << 50
# A hole is punched a piece at a time: others are answered in between.
PIECE_BYTES = 64 << 20
# So much of the host's memory is never promised: one part of so many.
_LEFT_FREE = 32
_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3; not in Python's os yet
_BLOCK_BYTES = 512


class Exhausted(Exception):
    """There is no room for a range; the text says why."""


class Memory:
    """The memfd, and the ranges of it that are taken."""

    def __init__(self, has_huge_pages: bool, space_bytes: int = SPACE_BYTES) -> None:
        self.has_huge_pages = has_huge_pages
        self.space_bytes = space_bytes
        self.fd = _memfd(has_huge_pages)
        os.ftruncate(self.fd, space_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._taken: list[tuple[int, int]] = []  # offset and bytes, in order
        self._next = 0
        self.taken_bytes = 0

    def take(self, size_bytes: int) -> int:
        """The offset of a range that is nobody else's and reads as zeros."""
        assert size_bytes > 0 and size_bytes % EXTENT_BYTES == 0
        if not self.has_huge_pages:
            self._check_host(size_bytes)
        offset = self._find(size_bytes)
        if self.has_huge_pages:
            self._reserve(offset, size_bytes)
        bisect.insort(self._taken, (offset, size_bytes))
        self._next = offset + size_bytes
        self.taken_bytes += size_bytes
        return offset

    def clear(self, offset: int, size_bytes: int) -> Iterator[None]:
        """Give the pages of a range back to the host, a piece at a time; it stays taken."""
        for start in range(offset, offset + size_bytes, PIECE_BYTES):
            length = min(PIECE_BYTES, offset + size_bytes - start)
            with mmap.mmap(self.fd, length, offset=start) as piece:
                if self.has_huge_pages:
                    # What was promised and never touched would else stay promised: a hole only
                    # gives back pages that are there.
                    for at in range(0, length, EXTENT_BYTES):
                        piece[at] = 0
                piece.madvise(mmap.MADV_REMOVE)
            yield

    def give_back(self, offset: int, size_bytes: int) -> None:
        """A range that has been cleared is nobody's."""
        self._taken.remove((offset, size_bytes))
        self.taken_bytes -= size_bytes

    def used_bytes(self) -> int:
        """What of the host's memory the file really holds."""
        return os.fstat(self.fd).st_blocks * _BLOCK_BYTES

    def can_promise_bytes(self) -> int:
        """How much more this host could back now, above what is promised already."""
        if self.has_huge_pages:
            return _huge_pages_free_bytes()
        unbacked_bytes = max(self.taken_bytes - self.used_bytes(), 0)
        left_bytes = host_memory_bytes() // _LEFT_FREE
        return max(available_bytes() - left_bytes - unbacked_bytes, 0)

    def _check_host(self, size_bytes: int) -> None:
        promised = self.can_promise_bytes()
        if size_bytes > promised:
            raise Exhausted(f"this host can back only {format_bytes(promised)} more")

    def _reserve(self, offset: int, size_bytes: int) -> None:
        """The kernel keeps huge pages for a range that was mapped once, or refuses the mapping."""
        try:
            mmap.mmap(self.fd, size_bytes, offset=offset).close()
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            free = format_bytes(_huge_pages_free_bytes())
            raise Exhausted(f"this host has only {free} in huge pages left") from error

    def _find(self, size_bytes: int) -> int:
        """The first gap behind the range that was taken last, else the first from the start."""
        for start in (self._next, 0):
            for gap_start, gap_end in self._gaps():
                low = max(gap_start, start)
                if gap_end - low >= size_bytes:
                    return low
        raise Exhausted("no range of addresses is long enough")

    def _gaps(self) -> Iterator[tuple[int, int]]:
        end = 0
        for offset, size_bytes in self._taken:
            yield end, offset
            end = offset + size_bytes
        yield end, self.space_bytes


def _memfd(has_huge_pages: bool) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if has_huge_pages:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    for extra in (_MFD_NOEXEC_SEAL, 0):
        try:
            return os.memfd_create("farmem-pool", flags | extra)
        except OSError as error:
            if error.errno == errno.EINVAL and extra:
                continue
            why = "huge pages of 2 MiB" if has_huge_pages else "memory"
            raise FarmemError(
                f"the kernel gives no {why}: {error.strerror}",
                "leave --huge-pages out, or use another kernel",
            ) from error
    raise AssertionError("not reached")


def _meminfo_bytes(name: str) -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            words = line.split()
            if words[0] == f"{name}:":
                return int(words[1]) << (10 if len(words) > 2 else 0)
    return 0


def huge_pages_bytes() -> int:
    """All huge pages of 2 MiB that this host has set aside."""
    return _huge_pages("nr_hugepages")


def _huge_pages_free_bytes() -> int:
    return max(_huge_pages("free_hugepages") - _huge_pages("resv_hugepages"), 0)


def _huge_pages(name: str) -> int:
    path = f"/sys/kernel/mm/hugepages/hugepages-{EXTENT_BYTES >> 10}kB/{name}"
    with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
        return int(file.read()) * EXTENT_BYTES
    return 0


def available_bytes() -> int:
    """What programs of this host, and of our control group, can still have without swapping."""
    found = _meminfo_bytes("MemAvailable")
    for folder in _cgroups():
        with contextlib.suppress(OSError, ValueError):
            limit = _number_in(f"{folder}/memory.max")
            reclaimable = _stat_of(folder, "inactive_file")
            found = min(found, limit - _number_in(f"{folder}/memory.current") + reclaimable)
    return max(found, 0)


def _number_in(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _stat_of(folder: str, name: str) -> int:
    with open(f"{folder}/memory.stat", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.split()[0] == name), 0)


def _cgroups() -> Iterator[str]:
    """The folders of our control group (version 2) and of those that it lies in."""
    with contextlib.suppress(OSError), open("/proc/self/cgroup", encoding="utf-8") as file:
        for line in file:
            if line.startswith("0::/"):
                path = line.strip()[3:]
                while path not in ("", "/"):
                    yield f"/sys/fs/cgroup{path}"
                    path = os.path.dirname(path)
