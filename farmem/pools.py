"""--pool as people write it: where evicted pages go.

Only `mem:` is known so far: the bytes stay on this host, in a sparse memfd that lives as
long as the job.  Opening it is the job's business.
"""

import os
from typing import NamedTuple

from farmem.errors import FarmemError
from farmem.sizes import format_bytes, parse_size

EXTENT_BYTES = 2 << 20
SCHEMES = {"mem": "memory of this host"}
_KNOWN = "pools are: mem: (as large as this host's memory) and mem:SIZE, as mem:8G"


class Pool(NamedTuple):
    """A pool that was asked for."""

    url: str
    capacity_bytes: int


def host_memory_bytes() -> int:
    """All the memory of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parse_pool(url: str) -> Pool:
    """A --pool URL, its capacity rounded down to whole extents."""
    scheme, colon, rest = url.partition(":")
    if not colon or scheme != "mem":
        raise FarmemError(f"there is no pool {url!r}", _KNOWN)
    wanted_bytes = parse_size(rest, "pool size") if rest else host_memory_bytes()
    capacity_bytes = wanted_bytes // EXTENT_BYTES * EXTENT_BYTES
    if capacity_bytes == 0:
        raise FarmemError(
            f"pool {url!r} is smaller than {format_bytes(EXTENT_BYTES)}, the least that is lent",
            _KNOWN,
        )
    return Pool(url, capacity_bytes)
