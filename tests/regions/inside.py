"""What the scripts of these tests share; imported in the process that has the regions.

The kernel's word, not the engine's: which pages are there is read from the page map, how much
anonymous memory there is from /proc/self/status.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import farmem
from farmem.engine import PAGE_BYTES

MIB = 1 << 20
_PRESENT = np.uint64(1 << 63)
_LIMIT_SECONDS = 120


def present(region: farmem.Region, offset: int = 0, length: int | None = None) -> np.ndarray:
    """For each page of a range whether the kernel has it in this process."""
    size = len(region) - offset if length is None else length
    first = (region._start + offset) // PAGE_BYTES
    count = -(-size // PAGE_BYTES)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(first * 8)
        entries = np.frombuffer(file.read(count * 8), dtype="u8")
    assert len(entries) == count
    return (entries & _PRESENT) != 0


def present_bytes(*regions: farmem.Region) -> int:
    return sum(int(present(region).sum()) for region in regions) * PAGE_BYTES


def anonymous_bytes() -> int:
    """RssAnon: the anonymous memory of this process that is here."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) << 10


def fill(region: farmem.Region, seed: int = 0) -> np.ndarray:
    """Give every word of a region a value of its own; the array."""
    array = region.ndarray(len(region) // 8, "u8")
    step = MIB // 8
    for at in range(0, len(array), step):
        part = array[at : at + step]
        part[:] = expected(at, len(part), seed)
    return array


def expected(at: int, count: int, seed: int = 0) -> np.ndarray:
    numbers = np.arange(at + 1, at + 1 + count, dtype="u8")
    return numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)


def verify(array: np.ndarray, seed: int = 0) -> None:
    """Every word must be what fill() wrote."""
    step = MIB // 8
    for at in range(0, len(array), step):
        part = array[at : at + step]
        wrong = np.flatnonzero(part != expected(at, len(part), seed))
        assert len(wrong) == 0, f"{len(wrong)} wrong words, the first at {at + wrong[0]}"


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + _LIMIT_SECONDS
    while not holds():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.005)


class Peak:
    """The most that a figure ever was, looked at all the time."""

    def __init__(self, figure: Callable[[], int]) -> None:
        self.most = figure()
        self.looks = 0
        self._figure = figure
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, self._figure())
            self.looks += 1
            time.sleep(0.001)

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        assert self.looks > 0


@contextmanager
def peak(figure: Callable[[], int]) -> Iterator[Peak]:
    watched = Peak(figure)
    try:
        yield watched
    finally:
        watched.end()


@contextmanager
def refused(kind: type[BaseException], *words: str) -> Iterator[None]:
    """What is inside must be refused, with these words."""
    try:
        yield
    except kind as error:
        for word in words:
            assert word in str(error), f"{word!r} is not in: {error}"
        if isinstance(error, farmem.FarmemError):
            assert error.hint, f"nothing says what to do instead: {error}"
        return
    raise AssertionError(f"it was not refused with {kind.__name__}")
