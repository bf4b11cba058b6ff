"""A server of a pool: what the job needs to know of it, and what keeps its memory ours.

Here is what servers of all kinds have in common; poolnbd.py and poolrdma.py are the kinds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from farmem import _native
from farmem.errors import FarmemError
from farmem.lease import FREE_SECONDS, Control, Lease, acquire, standing, unreachable
from farmem.poolentry import Way, end_entry, fill_entry
from farmem.pools import EXTENT_BYTES, host_memory_bytes
from farmem.rdmaagent import RdmaAgent
from farmem.servers import Address, Server, addresses_of
from farmem.sizes import format_bytes
from farmem.tls import PLAIN, Tls

lib = _native.lib


class Chunk(NamedTuple):
    """How much to lease, at most, where the URL does not say, and how long to wait for it."""

    most_bytes: int
    patience_seconds: float = FREE_SECONDS


class Means(NamedTuple):
    """What a job has to reach servers by."""

    rdma: RdmaAgent
    tls: Tls = PLAIN


def reach_server(server: Server, chunk: Chunk, deadline: float, means: Means) -> "PoolServer":
    """A server of whatever kind, that can be used from here on.  FarmemError: it can't."""
    if server.by_rdma:
        from farmem.poolrdma import PoolRdma

        return PoolRdma(server, chunk, deadline, means)
    from farmem.poolnbd import PoolNbd

    return PoolNbd(server, chunk, deadline, means)


class PoolServer:
    """A server that was reached, and memory of it that can be used."""

    def __init__(self, server: Server, chunk: Chunk, deadline: float, means: Means) -> None:
        self._server = server
        self._chunk = chunk
        self._means = means
        self.limit_bytes = 0  # what may be had of it in all; 0: no more than this
        self._lease: Lease | None = None
        self._there: Any = None
        try:
            addresses = addresses_of(server, deadline)
            self._take(self._open(addresses, deadline))
        except OSError as error:
            self.release()
            raise unreachable(self._server, error) from error
        except FarmemError:
            self.release()
            raise

    def _open(self, addresses: list[Address], deadline: float) -> int:
        """Make it ready; how many bytes there are."""
        raise NotImplementedError

    @property
    def way(self) -> Way:
        """How engines get there, which tells it from others, however they are called."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """As it was asked for."""
        return self._server.url

    def _take(self, size_bytes: int) -> None:
        self.capacity_bytes = size_bytes // EXTENT_BYTES * EXTENT_BYTES
        if self.capacity_bytes == 0:
            raise FarmemError(
                f"pool {self.url!r} has {format_bytes(size_bytes)}",
                f"{format_bytes(EXTENT_BYTES)} are the least",
            )

    def _acquire(self, control: Control, deadline: float) -> Lease:
        """A lease of as much as is wanted, or as may be had."""
        server, chunk = self._server, self._chunk
        self._lease = lease = acquire(
            control, server.size_bytes, chunk.most_bytes, deadline, chunk.patience_seconds
        )
        if server.size_bytes is None:
            self.limit_bytes = min(standing(control, deadline)[0], host_memory_bytes())
        return lease

    def fill(self, there: Any, timeout_ns: int) -> None:
        """Tell the engine where it is: a struct fm_pool_server."""
        self._there = there
        fill_entry(there, self._server.name, self.way, timeout_ns)

    def keep(self, say: Callable[[str], None]) -> None:
        """The supervisor's: see that the memory stays ours, and can be reached."""
        if self._lease is not None:
            self._lease.keep(say, self._is_lost)

    def _is_lost(self) -> None:
        end_entry(self._there, lib.FM_SERVER_GONE)

    @property
    def is_useful(self) -> bool:
        """Whether more can be stored there, as far as anybody knows."""
        return not self._there.gone and not self._there.down

    @property
    def grows(self) -> bool:
        """Whether it is one lease of several that the server may give us."""
        return self._lease is not None and self._server.size_bytes is None

    def give_back(self) -> None:
        """Nothing is stored there: the engines let go of it, and say nothing."""
        end_entry(self._there, lib.FM_SERVER_GIVEN_BACK)
        self.release()

    def release(self) -> None:
        """Give the lease back, if there is one."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None
