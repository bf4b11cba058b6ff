"""A pool on servers: all of them reached, within five seconds, or an error that names the one that
could not be.  To the engine each is a span of extents of the pool's one linear address space.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from farmem import _native
from farmem.errors import FarmemError
from farmem.pools import EXTENT_BYTES, Pool
from farmem.poolserver import PoolServer
from farmem.servers import REACH_SECONDS, Server

lib = _native.lib


class PoolServers:
    """The servers of a job."""

    is_direct = False

    def __init__(self, pool: Pool) -> None:
        self._servers = _reach_all(pool.servers, time.monotonic() + REACH_SECONDS)
        try:
            _check_that_they_differ(self._servers)
        except FarmemError:
            self.discard()
            raise
        self.capacity_bytes = sum(server.capacity_bytes for server in self._servers)
        self.fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)  # where others have a file

    def fill(self, control: Any, ledger: Any, timeout_ns: int) -> None:
        """Tell the engine where they are; an empty ledger gets its spans."""
        for number, server in enumerate(self._servers):
            server.fill(control.pool_servers[number], timeout_ns)
            added = lib.fm_pool_ledger_add(ledger, server.capacity_bytes // EXTENT_BYTES)
            assert added == number

    def keep(self, say: Callable[[str], None]) -> None:
        """The supervisor's: see that the memory stays ours."""
        for server in self._servers:
            server.keep(say)

    def discard(self) -> None:
        """The job has ended, or never began: give the leases back."""
        _at_once([server.release for server in self._servers])


def _at_once(calls: list[Callable[[], None]]) -> None:
    """All of them, and none waits for another."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls[1:]]
    for thread in threads:
        thread.start()
    if calls:
        calls[0]()
    for thread in threads:
        thread.join()


def _reach_all(servers: tuple[Server, ...], deadline: float) -> list[PoolServer]:
    """At the same time, so that one deadline does for all; the first error in their order."""
    found: dict[int, PoolServer] = {}
    failed: dict[int, FarmemError] = {}

    def reach(number: int) -> None:
        try:
            found[number] = PoolServer(servers[number], deadline)
        except FarmemError as error:
            failed[number] = error

    _at_once([lambda number=number: reach(number) for number in range(len(servers))])  # type: ignore[misc]
    if failed:
        _at_once([server.release for server in found.values()])
        raise failed[min(failed)]
    return [found[number] for number in range(len(servers))]


def _check_that_they_differ(servers: list[PoolServer]) -> None:
    """Two names of one export would be two places that overwrite each other."""
    known: dict[tuple[bytes, bytes], str] = {}
    for server in servers:
        other = known.setdefault(server.place, server.url)
        if other is not server.url:
            raise FarmemError(
                f"pools {other!r} and {server.url!r} are the same memory", "name each server once"
            )
