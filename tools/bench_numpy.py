"""The numpy program that `make bench` measures: sweeps over one array of MIB mebibytes.

    python bench_numpy.py MIB

Four operations, each with the clock on: multiply every element in place, add all of them up, add 1
to the first element of every page, gather one random element for each page.  Then, with the clock
off, every element is compared with what it must be.  One line of JSON goes to stdout.

The elements start as their own index, so a page packs to less than half, as the pages of many
real programs do.  It knows nothing of farmem and must not: it is the unmodified program.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np

PAGE_ELEMENTS = 512
BLOCK_ELEMENTS = 1 << 17
MASK = (1 << 64) - 1

Array = np.ndarray[tuple[int], np.dtype[np.uint64]]


def fill(size: int) -> Array:
    """A block at a time, so that nothing but the array is large."""
    array = np.empty(size, dtype=np.uint64)
    for start in range(0, size, BLOCK_ELEMENTS):
        array[start : start + BLOCK_ELEMENTS] = np.arange(
            start, min(start + BLOCK_ELEMENTS, size), dtype=np.uint64
        )
    return array


def count_bad(array: Array) -> int:
    bad = 0
    for start in range(0, len(array), BLOCK_ELEMENTS):
        block = array[start : start + BLOCK_ELEMENTS]
        want = np.arange(start, start + len(block), dtype=np.uint64) * np.uint64(3)
        want[::PAGE_ELEMENTS] += np.uint64(1)
        bad += int(np.count_nonzero(block != want))
    return bad


def main() -> int:
    size = int(sys.argv[1]) * (1 << 20) // 8
    array = fill(size)
    pages = size // PAGE_ELEMENTS
    places = np.random.default_rng(7).integers(0, size, size=pages)
    times_ns: dict[str, int] = {}

    def timed(name: str, work: Callable[[], object]) -> int:
        start_ns = time.monotonic_ns()
        result = work()
        times_ns[name] = time.monotonic_ns() - start_ns
        return int(result) if isinstance(result, np.integer) else 0

    def multiply() -> None:
        np.multiply(array, np.uint64(3), out=array)

    def stride() -> None:
        array[::PAGE_ELEMENTS] += np.uint64(1)

    def gather() -> object:
        return array[places].sum()

    timed("multiply", multiply)
    total = timed("sum", array.sum)
    timed("stride", stride)
    gathered = timed("gather", gather)

    bad = count_bad(array)
    bad += total != 3 * (size * (size - 1) // 2) & MASK
    firsts = int(np.count_nonzero(places % PAGE_ELEMENTS == 0))
    bad += gathered != 3 * int(places.sum()) + firsts
    print(json.dumps({"times_ns": times_ns, "pages": pages, "bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
