"""Pages that are brought in windows, without a fault: Region.willneed() on what was evicted.

As a program, for tools/bench_net.py: `bench_windows.py POOL MIB` prints a line of JSON, how long
a page took.  Its budget holds what is brought, so nothing is evicted meanwhile.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from bench_run import Failed

MIB = 1 << 20
PAGE_BYTES = 4096
ROOM_BYTES = 64 * MIB
TIMES = 4


def page_ns(region: Any, brought_bytes: int) -> float:
    """Nanoseconds for each page of as many bytes from the region's beginning."""
    region.evict()
    before = region.budget.stats().counters["pages_fetched"]
    begin_ns = time.monotonic_ns()
    region.willneed(0, brought_bytes)
    taken_ns = time.monotonic_ns() - begin_ns
    fetched = region.budget.stats().counters["pages_fetched"] - before
    if fetched < brought_bytes // PAGE_BYTES:
        raise Failed(f"only {fetched} pages came")
    return taken_ns / float(fetched)


def main() -> int:
    import farmem

    pool, brought_bytes = sys.argv[1], int(sys.argv[2]) * MIB
    budget = farmem.Budget(brought_bytes + ROOM_BYTES, pool=pool)
    region = farmem.Region(brought_bytes, budget=budget)
    view = region.view()
    for page in range(brought_bytes // PAGE_BYTES):
        view[page * PAGE_BYTES] = page % 251 + 1
    # The first time also touches the staging area for the first time.
    found = [page_ns(region, brought_bytes) for _ in range(TIMES)][1:]
    if any(
        view[page * PAGE_BYTES] != page % 251 + 1 for page in range(brought_bytes // PAGE_BYTES)
    ):
        raise Failed("wrong bytes")
    print(json.dumps({"ns": sum(found) / len(found)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
