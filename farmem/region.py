"""Regions: memory that a Python program asks for, of which only a part has to be here.

A Region is an anonymous `mmap.mmap` of Python's own whose pages come and go: those that are
not touched for long move to a pool, and come back when they are touched.  Everything that
takes a buffer works on it.  The engine does the work (engine.py); here is what a program
sees of it.
"""

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from farmem import _native
from farmem.engine import PAGE_BYTES, address_of
from farmem.errors import FarmemError, PageLost, RegionInUse
from farmem.regionbudget import Budget, budget_for, size_of
from farmem.sizes import format_bytes

if TYPE_CHECKING:
    import numpy

lib = _native.lib

# Python 3.11 does not name it: address space alone is reserved.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_ADVICE: dict[str, int] = {
    "normal": lib.FM_REGION_NORMAL,
    "sequential": lib.FM_REGION_SEQUENTIAL,
    "random": lib.FM_REGION_RANDOM,
}


@dataclass(frozen=True, slots=True)
class RegionStats:
    """What a Region's stats() tells: where its pages are.  All but pinned_bytes add up to size."""

    size_bytes: int
    local_bytes: int  # mapped in this process: a touch is not noticed by anybody
    moving_bytes: int  # in a frame of the engine's, on the way out or in
    remote_bytes: int  # only in the pool
    empty_bytes: int  # never written, or all zeros when it left: nowhere
    lost_bytes: int  # can't be had any more: touching it is SIGBUS
    pinned_bytes: int


class Region:
    """Anonymous memory that may be larger than what is local.

    >>> import farmem
    >>> region = farmem.Region("64M", local="16M")
    >>> array = region.ndarray((8, 1 << 20), "float64")
    >>> array[:] = 1.5
    >>> float(array.sum())
    12582912.0
    >>> region.stats().local_bytes <= 16 << 20
    True
    >>> region.close()
    Traceback (most recent call last):
    ...
    farmem.errors.RegionInUse: the region is in use: views of it are alive
      let go of its arrays, tensors and memoryviews first: del array
    >>> del array
    >>> region.close()

    `size` is a number of bytes or a size such as "64G".  The first region of a process brings
    its Budget: `local=`, `pool=` and `filters=` as there.  Later ones share it, and so do all
    regions of a program that runs under `farmem run`: there the budget is the job's.

    A region is a context manager that closes it; and it is zeros until it is written.  Ranges
    are given as an offset and a length in bytes (None: to the end), and are widened to whole
    pages of 4096 bytes.

    Without privilege the kernel tells us of faults in the program alone: a system call that
    meets a missing page of a region fails with EFAULT (`region.budget.user_mode_only` tells).
    pin() what a system call is to read or write.
    """

    def __init__(
        self,
        size: int | str,
        *,
        local: int | str | None = None,
        pool: str | Sequence[str] | None = None,
        filters: Sequence[str] = (),
        budget: Budget | None = None,
    ) -> None:
        self._size_bytes = size_of(size, "region size")
        self._budget = budget_for(budget, local, pool, filters)
        self._engine = self._budget.engine
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, self._size_bytes, flags=flags)
        except (OSError, OverflowError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise FarmemError(
                f"a region of {format_bytes(self._size_bytes)} can't be had: {why}",
                "ask for less, or see `ulimit -v` and vm.overcommit_memory",
            ) from error
        self._start = address_of(self._map)
        self._mapped_bytes = -(-self._size_bytes // PAGE_BYTES) * PAGE_BYTES
        try:
            self._call(lib.FM_REGION_ADD, 0, None)
        except BaseException:
            self._map.close()
            raise

    # ---- what is in it

    def view(self) -> memoryview:
        """The region's bytes, writable.  The region can't be closed while the view is alive.

        >>> import farmem
        >>> with farmem.Region("1M", local="16M") as region, region.view() as view:
        ...     view[:5] = b"hello"
        ...     bytes(view[:8])
        b'hello\\x00\\x00\\x00'

        From Python 3.12 on `memoryview(region)` is the same, and a region can be given wherever
        a buffer is wanted.
        """
        self._check_open()
        return memoryview(self._map)

    def __buffer__(self, flags: int, /) -> memoryview:
        return self.view()

    def ndarray(
        self, shape: int | Sequence[int], dtype: Any = "float64", *, offset: int = 0
    ) -> "numpy.ndarray[Any, Any]":
        """A numpy array on the region's memory, from a byte offset on.

        >>> import farmem
        >>> region = farmem.Region("64M", local="16M")
        >>> a = region.ndarray((1000, 1000), "float32")
        >>> b = region.ndarray(1000, "int64", offset=a.nbytes)
        >>> a.dtype, b.shape
        (dtype('float32'), (1000,))

        A torch tensor on it: `torch.from_numpy(array)` or `torch.from_dlpack(array)`.  Not
        torch.frombuffer(): it forgets that the memory is in use, and the region could be closed
        under the tensor.
        """
        self._check_open()
        try:
            import numpy
        except ImportError as error:
            raise FarmemError("ndarray() needs numpy", "pip install numpy") from error
        try:
            sizes = list(shape) if isinstance(shape, Iterable) else [shape]
            if min(sizes, default=1) < 0:
                raise ValueError("a size is negative")
            count = math.prod(sizes)
            # Not numpy.ndarray(buffer=...): it lets go of the export at once.
            if count == 0:
                return numpy.empty(sizes, dtype)
            return numpy.frombuffer(self._map, dtype, count, offset).reshape(sizes)
        except (TypeError, ValueError) as error:
            raise FarmemError(
                f"no array of shape {shape!r} and type {dtype!r} at offset {offset} of a region "
                f"of {format_bytes(self._size_bytes)}: {error}",
                "see that it fits: the product of the shape times the type's size",
            ) from error

    def __dlpack__(self, **how: Any) -> Any:
        """For numpy.from_dlpack(region), torch.from_dlpack(region) and others: its bytes."""
        array: Any = self.ndarray(self._size_bytes, "uint8")
        return array.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU

    def __len__(self) -> int:
        return self._size_bytes

    # ---- where it is

    def willneed(self, offset: int = 0, length: int | None = None) -> None:
        """Bring a range here; returns when all of it has been here.

        >>> import farmem
        >>> region = farmem.Region("64M", local="32M")
        >>> region.view()[:] = b"x" * len(region)
        >>> region.willneed(0, 8 << 20)

        Other threads may go on meanwhile.  A range that the budget can't hold at once is refused.
        What has come may leave again when others need the room: see pin().
        """
        self._call(lib.FM_REGION_WILLNEED, offset, length)

    def evict(self, offset: int = 0, length: int | None = None) -> None:
        """Send a range away now, as far as it is not pinned; it comes back when it is touched.

        >>> import farmem
        >>> region = farmem.Region("1M", local="16M")
        >>> region.view()[:] = b"x" * len(region)
        >>> region.evict()
        >>> stats = region.stats()
        >>> stats.local_bytes, stats.remote_bytes
        (0, 1048576)
        """
        self._call(lib.FM_REGION_EVICT, offset, length)
        self.check(offset, length)

    def pin(self, offset: int = 0, length: int | None = None) -> None:
        """Bring a range here and keep it here until unpin().

        >>> import farmem
        >>> region = farmem.Region("64M", local="16M")
        >>> region.pin(0, 1 << 20)
        >>> with open("/dev/zero", "rb", buffering=0) as file, region.view() as view:
        ...     file.readinto(view[:1000])
        1000
        >>> region.unpin(0, 1 << 20)

        Pins count in the budget, and don't nest: one unpin() ends any number of them.  A pin that
        leaves the engine too little to work in is refused.  When bytes turn out to be lost on the
        way, or you interrupt it, all of the range is unpinned.
        """
        try:
            self._call(lib.FM_REGION_PIN, offset, length)
        except KeyboardInterrupt:
            self.unpin(offset, length)
            raise

    def unpin(self, offset: int = 0, length: int | None = None) -> None:
        """Let a range be evicted again."""
        self._call(lib.FM_REGION_UNPIN, offset, length)

    def advise(self, advice: str, offset: int = 0, length: int | None = None) -> None:
        """Say how a range will be used: "sequential", "random" or "normal".

        >>> import farmem
        >>> region = farmem.Region("64M", local="16M")
        >>> region.advise("random", 0, 32 << 20)

        Sequential ranges are fetched in large windows from the first fault on, random ones page
        by page.  Normally that is found out from what the program does.
        """
        if advice not in _ADVICE:
            raise FarmemError(f"there is no advice {advice!r}", f"advice is: {', '.join(_ADVICE)}")
        self._call(lib.FM_REGION_ADVISE, offset, length, _ADVICE[advice])

    def check(self, offset: int = 0, length: int | None = None) -> None:
        """Raise PageLost if bytes of a range are known to be lost.

        What the pool has lost is found out when it is fetched: willneed() finds out.
        """
        answer = self._call(lib.FM_REGION_TALLY, offset, length)
        if answer.first_lost:
            raise self._page_lost(answer.first_lost)

    def stats(self) -> RegionStats:
        """Where the region's pages are now, by the engine's books."""
        now = self._call(lib.FM_REGION_TALLY, 0, None)
        return RegionStats(
            size_bytes=self._mapped_bytes,
            local_bytes=now.resident * PAGE_BYTES,
            moving_bytes=now.moving * PAGE_BYTES,
            remote_bytes=now.remote * PAGE_BYTES,
            empty_bytes=now.fresh * PAGE_BYTES,
            lost_bytes=now.lost * PAGE_BYTES,
            pinned_bytes=now.pinned * PAGE_BYTES,
        )

    # ---- budget

    @property
    def budget(self) -> Budget:
        """The budget that it shares with the process's other regions."""
        return self._budget

    @property
    def local_bytes(self) -> int:
        """How much of all the process's regions may be local: that of the budget."""
        return self._budget.local_bytes

    @local_bytes.setter
    def local_bytes(self, value: int | str) -> None:
        self._budget.local_bytes = value

    # ---- its end

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._map.closed

    def close(self) -> None:
        """Give the memory back, and what it has in the pool.

        While views of it are alive that is refused with RegionInUse (a BufferError): memory is
        never taken away under an array.  A region that is just let go of is closed when the last
        of its views goes.
        """
        try:
            self._map.close()
        except BufferError:
            raise RegionInUse(
                "the region is in use: views of it are alive",
                "let go of its arrays, tensors and memoryviews first: del array",
            ) from None

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except RegionInUse:
            if error is None:
                raise
            # Its traceback holds the views; the memory goes with them.

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<farmem.Region of {format_bytes(self._size_bytes)}{state}>"

    # ---- asking the engine

    def _check_open(self) -> None:
        if self.closed:
            raise FarmemError("the region is closed", "make another one: farmem.Region(size)")

    def _range(self, offset: int, length: int | None) -> tuple[int, int]:
        """A range in whole pages: its address and its length."""
        end = self._size_bytes if length is None else offset + length
        if not 0 <= offset <= end <= self._size_bytes:
            raise FarmemError(
                f"offset {offset}, length {length} lies outside of the region's "
                f"{self._size_bytes} bytes",
                "give an offset and a length within it",
            )
        first = offset // PAGE_BYTES * PAGE_BYTES
        last = min(-(-end // PAGE_BYTES) * PAGE_BYTES, self._mapped_bytes)
        return self._start + first, last - first

    def _call(self, kind: int, offset: int, length: int | None, value: int = 0) -> Any:
        """Have something done with a range; an error says why it was not."""
        self._check_open()
        # As long as this view is alive nobody closes the region.
        with memoryview(self._map):
            start, size_bytes = self._range(offset, length)
            if size_bytes == 0:
                kind = lib.FM_REGION_LOOK
            answer = self._engine.call(kind, start, size_bytes, value)
        if answer.answer != lib.FM_REGION_DONE:
            raise self._failure(answer, size_bytes)
        return answer

    def _page_lost(self, address: int) -> PageLost:
        offset = address - self._start
        return PageLost(
            f"bytes of the region are lost: the page at offset {offset} can't be had from the pool",
            "write all of it anew in another region; what was stored last is gone",
            offset,
        )

    def _failure(self, answer: Any, size_bytes: int) -> FarmemError:
        if answer.answer == lib.FM_REGION_LOST:
            return self._page_lost(answer.at)
        size = format_bytes(size_bytes)
        what, hint = {
            lib.FM_REGION_NO_ROOM: (
                f"{size} can't be here at once: of a budget of {format_bytes(self.local_bytes)}, "
                f"{format_bytes(answer.pinned_bytes)} are pinned, and the engine needs "
                f"{format_bytes(lib.FM_REGION_HEAD_ROOM_BYTES)}",
                "give a smaller range, unpin others, or raise the budget: region.local_bytes = ...",
            ),
            lib.FM_REGION_FULL: (
                "the pool is full: what is left of the range stays here",
                "ask for a larger pool, as pool='mem:8G'",
            ),
            lib.FM_REGION_STORE_FAILED: (
                "the pool did not take all of the range: the rest stays here",
                "see what the pool says, and try again",
            ),
            lib.FM_REGION_NO_MEMORY: (
                "no memory is left for the engine's records",
                "see `ulimit -v` and the host's free memory",
            ),
            lib.FM_REGION_NOT_MANAGED: (
                "the engine does not manage this memory: it can't be registered, or was unmapped",
                "see that nobody else maps or unmaps it, and vm.max_map_count",
            ),
        }.get(
            answer.answer,
            (
                "the engine can't work in this process",
                "see that userfaultfd and memory for the engine can be had here (`ulimit -v`)",
            ),
        )
        return FarmemError(what, hint)
