"""--pool as people write it: where evicted pages go.

`mem:` keeps the bytes on this host, in a sparse memfd; `file:` in a file of a local file
system; the others on a server, see servers.py.  What is read here is only looked at, never made:
opening is the job's business.  A size stands before a path, never behind it, because a path can
hold any character.
"""

import os
import resource
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from farmem.errors import FarmemError
from farmem.sizes import format_bytes, parse_size

if TYPE_CHECKING:
    from farmem.registry import Registry
    from farmem.servers import Server

EXTENT_BYTES = 2 << 20
SERVERS_MAX = 32  # FM_POOL_SERVERS_MAX
SCHEMES = {"mem": "memory of this host", "file": "a file on this host's disk"}
SERVER_SCHEMES = {
    "tcp": "memory of another host: a farmem serve",
    "rdma": "memory of another host, by one-sided RDMA: a farmem serve",
    "unix": "a farmem serve on this host, by its socket",
    "nbd": "an NBD server's export",
    "nbds": "an NBD server's export, with TLS",
    "nbd+unix": "an NBD server on this host, by its socket",
    "registry+http": "the servers that a farmem serve knows of",
    "registry+https": "the servers that a farmem serve knows of, with TLS",
    "registry+etcd": "the servers that etcd knows of",
    "registry+etcds": "the servers that etcd knows of, with TLS",
    "registry+file": "the servers that a file names",
}
# More is only used when it was asked for: the ledger of a pool costs address space.
FILE_BYTES_DEFAULT_MAX = 1 << 40
# Others need space too: so much of what is free is left alone unless a size was given.
_LEFT_FREE = 10
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
_KNOWN = (
    "pools are: mem: (as large as this host's memory), mem:SIZE, "
    "file:FOLDER, file:PATH, file:SIZE:PATH, tcp://HOST:PORT, rdma://HOST:PORT, unix:///PATH, "
    "nbd://HOST:PORT/EXPORT, nbds://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH, "
    "registry+http://HOST:PORT, registry+etcd://HOST:PORT[,HOST:PORT]/PREFIX, "
    "registry+https://..., registry+etcds://... (with TLS), registry+file:///PATH.toml"
)
FILE_HINT = "name a folder on a disk, as --pool file:/var/tmp or --pool file:64G:/var/tmp"


class Pool(NamedTuple):
    """A pool that was asked for; a path only for file:, absolute and without links; of servers
    the capacity is 0 until they have been asked."""

    url: str
    capacity_bytes: int
    path: str = ""
    servers: "tuple[Server, ...]" = ()
    registry: "Registry | None" = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is on servers."""
        return bool(self.servers) or self.registry is not None


def host_memory_bytes() -> int:
    """All the memory of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parse_pool(url: str) -> Pool:
    """A --pool URL, its capacity rounded down to whole extents."""
    scheme, colon, rest = url.partition(":")
    if colon and scheme == "mem":
        wanted_bytes = parse_size(rest, "pool size") if rest else host_memory_bytes()
        return Pool(url, _whole_extents(url, wanted_bytes))
    if colon and scheme == "file":
        size, path = _split_file(url, rest)
        path = _existing_place(url, path)
        wanted_bytes = _free_bytes(path) if size is None else parse_size(size, "pool size")
        return Pool(url, _whole_extents(url, wanted_bytes), path)
    if colon and scheme.startswith("registry+"):
        from farmem.registry import parse_registry

        return Pool(url, 0, registry=parse_registry(url))
    if colon and scheme in SERVER_SCHEMES:
        from farmem.servers import parse_server

        server = parse_server(url)
        if server.size_bytes is not None:
            server = server._replace(size_bytes=_whole_extents(url, server.size_bytes))
        return Pool(url, 0, servers=(server,))
    raise FarmemError(f"there is no pool {url!r}", _KNOWN)


def join_pools(pools: Sequence[Pool]) -> Pool:
    """One pool of all that were asked for: several must be servers."""
    if len(pools) == 1:
        return pools[0]
    urls = [pool.url for pool in pools]
    for pool in pools:
        if not pool.servers:
            raise FarmemError(
                f"pool {pool.url!r} is no server, and only servers can be used together",
                "give --pool once, or servers one by one, as --pool tcp://A:7717 --pool tcp://B:7717",
            )
        if urls.count(pool.url) > 1:
            raise FarmemError(f"pool {pool.url!r} is named twice", "name each server once")
    if len(pools) > SERVERS_MAX:
        raise FarmemError(
            f"{len(pools)} pools are too many", f"{SERVERS_MAX} are the most that a job can use"
        )
    servers = tuple(server for pool in pools for server in pool.servers)
    return Pool(" ".join(urls), 0, servers=servers)


def _whole_extents(url: str, wanted_bytes: int) -> int:
    capacity_bytes = wanted_bytes // EXTENT_BYTES * EXTENT_BYTES
    if capacity_bytes == 0:
        least = format_bytes(EXTENT_BYTES)
        raise FarmemError(
            f"pool {url!r} has {format_bytes(wanted_bytes)}, and {least} are the least", _KNOWN
        )
    return capacity_bytes


def _split_file(url: str, rest: str) -> tuple[str | None, str]:
    """The size, if any, and the path.  A path begins with / or . and a size never does."""
    size, path = None, rest
    if not rest.startswith(("/", ".")) and ":" in rest:
        size, _, path = rest.partition(":")
    if not path:
        raise FarmemError(f"pool {url!r} names no path", FILE_HINT)
    if not path.startswith(("/", ".")):
        raise FarmemError(
            f"pool {url!r}: the path {path!r} begins with neither / nor .",
            f"write it as file:./{path}, or name a folder on a disk, as file:/var/tmp",
        )
    return size, path


def _existing_place(url: str, path: str) -> str:
    """The resolved path, if something is there or can be made there."""
    if "\0" in path:
        raise FarmemError(f"pool {url!r}: a path has no zero bytes", FILE_HINT)
    resolved = os.path.realpath(path)
    folder = resolved if os.path.isdir(resolved) else os.path.dirname(resolved)
    if not os.path.isdir(folder):
        raise FarmemError(f"pool {url!r}: there is no folder {folder!r}", FILE_HINT)
    if path.endswith("/") and folder != resolved:
        raise FarmemError(f"pool {url!r}: {resolved!r} is not a folder", FILE_HINT)
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise FarmemError(f"pool {url!r}: the folder {folder!r} can't be written to", FILE_HINT)
    kind = file_system_of(folder)
    if kind in _IN_MEMORY:
        raise FarmemError(
            f"pool {url!r}: {folder!r} lies in memory ({kind}), so nothing would be freed",
            FILE_HINT,
        )
    return resolved


def smaller_pool_hint(pool: Pool) -> str:
    """What to type instead of a pool that is too large."""
    if pool.servers and not all(server.leases for server in pool.servers):
        return "let the server export less"
    smaller = f"file:8G:{pool.path}" if pool.path else "mem:8G"
    if pool.servers:
        smaller = f"{pool.servers[0].url.partition('?')[0]}?size=8G"
    return f"ask for a smaller one, as --pool {smaller}"


def file_system_of(folder: str) -> str:
    """The kind of file system that a folder lies in, as the kernel calls it; empty: unknown."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.split()
            if words[2] == wanted:
                return words[words.index("-") + 1]
    return ""


def _free_bytes(path: str) -> int:
    """What the file system has free, as far as one file of this user may have it."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    there = os.statvfs(folder)
    free_bytes = there.f_bavail * there.f_frsize
    limit_bytes = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit_bytes != resource.RLIM_INFINITY:
        free_bytes = min(free_bytes, limit_bytes)
    return min(free_bytes - free_bytes // _LEFT_FREE, FILE_BYTES_DEFAULT_MAX)
