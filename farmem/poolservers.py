"""A pool on servers: all of them reached, within five seconds, or an error that names the one that
could not be.  To the engine each lease is a span of extents of the pool's one linear address space.

The supervisor leases more ahead of need, and gives back what has long been unused (growth.py).
Only its one thread for this changes which spans there are.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from farmem import _native
from farmem.errors import FarmemError
from farmem.growth import can_spare, first_bytes, wanted_bytes
from farmem.lease import Control, standing
from farmem.poolentry import Way
from farmem.pools import EXTENT_BYTES, SERVERS_MAX, Pool, host_memory_bytes, parse_pool
from farmem.poolserver import Chunk, Means, PoolServer, reach_server
from farmem.rdmaagent import CHOSEN, RdmaAgent, Wanted
from farmem.servers import REACH_SECONDS, Server, addresses_of, at_once
from farmem.tls import PLAIN, Tls

if TYPE_CHECKING:
    from farmem.registry import Registry
    from farmem.registry.watcher import Watcher

ffi, lib = _native.ffi, _native.lib

Say = Callable[[str], None]
# Of a registry's servers so many are used at the start; the others as the job grows.
_START_SERVERS = 2
# A job may grow by servers that are not known yet: so many times this host's memory, at most.
_REGISTRY_HOSTS = 4
_LOOK_SECONDS = 0.05
_AGAIN_SECONDS = 2.0
_UNUSED_SECONDS = 5.0
_LIST_SECONDS = 10.0
_JOIN_SECONDS = 2.0


class PoolServers:
    """The servers of a job."""

    is_direct = False

    def __init__(
        self, pool: Pool, budget_bytes: int, tls: Tls = PLAIN, rdma: Wanted = CHOSEN
    ) -> None:
        self._sources = Sources(pool, tls)
        self._means = Means(RdmaAgent(rdma), tls)
        self._notes: list[str] = []
        self._control: Any = None
        self._ledger: Any = None
        self._timeout_ns = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._unused_since: dict[int, float] = {}
        try:
            servers = self._reach(pool, budget_bytes, time.monotonic() + REACH_SECONDS)
        except FarmemError:
            self._means.rdma.stop()
            raise
        self._means.rdma.settle()
        self._live = dict(enumerate(servers))
        self._places_used = len(servers)
        try:
            _check_that_they_differ(servers)
        except FarmemError:
            self.discard()
            raise
        self.capacity_bytes = self._most_bytes(servers)
        self.fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)  # where others have a file

    def _reach(self, pool: Pool, budget_bytes: int, deadline: float) -> list[PoolServer]:
        if pool.registry is None:
            chunk = Chunk(first_bytes(budget_bytes, len(pool.servers)))
            found, failed = _reach_all(pool.servers, chunk, deadline, self._means)
            if failed:
                at_once([server.release for server in found])
                raise failed[0]
            return found
        choices = self._sources.choices(time.monotonic())
        errors: list[FarmemError] = []
        for servers in (choices[:_START_SERVERS], choices[_START_SERVERS:SERVERS_MAX]):
            chunk = Chunk(first_bytes(budget_bytes, _START_SERVERS))
            found, failed = _reach_all(servers, chunk, deadline, self._means)
            errors += failed
            if found:
                self._notes = [f"{error.what}: going on without it" for error in errors]
                return found
        what = f": {errors[0].what}" if errors else ""
        raise FarmemError(
            f"registry {pool.url!r} names no server that can be used{what}",
            f"see what is registered: farmem pools --registry {pool.url}",
        )

    def _most_bytes(self, servers: list[PoolServer]) -> int:
        """How large the pool can become."""
        fixed = sum(server.capacity_bytes for server in servers if not server.grows)
        limits: dict[str, int] = {}
        for server in servers:
            if server.grows:
                limits[server.url] = max(server.limit_bytes, server.capacity_bytes)
        most = fixed + sum(limits.values())
        if self._sources.is_open:
            most = max(most, _REGISTRY_HOSTS * host_memory_bytes())
        return most // EXTENT_BYTES * EXTENT_BYTES

    def fill(self, control: Any, ledger: Any, timeout_ns: int) -> None:
        """Tell the engine where they are; an empty ledger gets its spans."""
        self._control, self._ledger, self._timeout_ns = control, ledger, timeout_ns
        for number, server in self._live.items():
            self._add(number, server)
        control.pool_grows = self._sources.can_grow

    def _add(self, number: int, server: PoolServer) -> bool:
        server.fill(self._control.pool_servers[number], self._timeout_ns)
        added = lib.fm_pool_ledger_add(self._ledger, server.capacity_bytes // EXTENT_BYTES)
        assert added in (number, -1)
        return bool(added == number)

    def keep(self, say: Say) -> None:
        """The supervisor's: see that the memory stays ours, and that there is enough."""
        for note in self._notes:
            say(note)
        self._means.rdma.keep(say)
        for server in self._live.values():
            server.keep(say)
        if self._sources.can_grow:
            self._sources.watch()
            self._thread = threading.Thread(target=self._tend, args=(say,), daemon=True)
            self._thread.start()

    def discard(self) -> None:
        """The job has ended, or never began: give the leases back."""
        if self._thread is not None:
            self._stopped.set()
            self._sources.stop()
            self._thread.join(_JOIN_SECONDS)
        self._means.rdma.stop()  # our halves of queue pairs go before the leases
        at_once([server.release for server in self._live.values()])

    # ---- growing and shrinking: one thread of the supervisor's

    def _tend(self, say: Say) -> None:
        again = 0.0
        while not self._stopped.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if self._sources.has_news():
                again = 0.0
            free_bytes, leased_bytes = self._room()
            more_bytes = wanted_bytes(free_bytes, leased_bytes, SERVERS_MAX - self._places_used)
            if not more_bytes:
                self._control.pool_grows = 1
                self._shrink(free_bytes, leased_bytes, now)
            elif now >= again:
                has_grown = self._grow(more_bytes, say)
                self._control.pool_grows = has_grown
                again = 0.0 if has_grown else now + _AGAIN_SECONDS

    def _room(self) -> tuple[int, int]:
        """What is free and what there is, on servers that can be used."""
        numbers = [number for number, server in self._live.items() if server.is_useful]
        free = sum(lib.fm_pool_ledger_span_free(self._ledger, number) for number in numbers)
        there = sum(lib.fm_pool_ledger_span_extents(self._ledger, number) for number in numbers)
        return free * EXTENT_BYTES, there * EXTENT_BYTES

    def _grow(self, more_bytes: int, say: Say) -> bool:
        more_bytes = min(more_bytes, lib.fm_pool_ledger_room(self._ledger) * EXTENT_BYTES)
        if not more_bytes:
            return False
        try:
            servers = self._sources.choices(time.monotonic())
        except FarmemError:
            return False  # the registry is away
        for server in servers:
            try:
                chunk = Chunk(more_bytes, patience_seconds=0)
                deadline = time.monotonic() + REACH_SECONDS
                found = reach_server(server, chunk, deadline, self._means)
            except FarmemError:
                continue  # it is full, or gone: the next one
            known = {other.way for other in self._live.values()}
            number = self._places_used
            if self._stopped.is_set() or found.way in known or not self._add(number, found):
                found.release()
                return False
            self._places_used += 1
            self._live[number] = found
            found.keep(say)
            return True
        return False

    def _shrink(self, free_bytes: int, leased_bytes: int, now: float) -> None:
        """One lease at most, that nothing has been stored in for a while."""
        places = SERVERS_MAX - self._places_used
        for number, server in reversed(self._live.items()):
            extents = lib.fm_pool_ledger_span_extents(self._ledger, number)
            idle = lib.fm_pool_ledger_span_free(self._ledger, number) + 1 >= extents
            if not idle or not server.grows or not server.is_useful:
                self._unused_since.pop(number, None)
                continue
            since = self._unused_since.setdefault(number, now)
            if now - since < _UNUSED_SECONDS or not can_spare(
                free_bytes, leased_bytes, extents * EXTENT_BYTES, places
            ):
                continue
            if lib.fm_pool_ledger_close(self._ledger, number) == 0:
                server.give_back()
                del self._live[number]
                return


class Sources:
    """Where more can be leased: the servers that were named, or all that are registered."""

    def __init__(self, pool: Pool, tls: Tls) -> None:
        self._tls = tls
        self._named = [s for s in pool.servers if s.leases and s.size_bytes is None]
        self._registry: Registry | None = pool.registry
        self._watcher: Watcher | None = None
        if self._registry is not None:
            self._registry.tls = tls
        self._listed: list[tuple[Server, int]] = []
        self._listed_at = -_LIST_SECONDS

    @property
    def is_open(self) -> bool:
        """Whether there can be servers that nobody knows of yet."""
        return self._registry is not None

    @property
    def can_grow(self) -> bool:
        """Whether there are any."""
        return self.is_open or bool(self._named)

    def watch(self) -> None:
        """Learn of new servers at once."""
        if self._registry is not None:
            from farmem.registry.watcher import Watcher

            self._watcher = Watcher(self._registry)
            self._watcher.start()

    def stop(self) -> None:
        """The job has ended."""
        if self._watcher is not None:
            self._watcher.stop()

    def has_news(self) -> bool:
        """Whether others are listed since this was asked; then the list is an old one."""
        if self._watcher is None or not self._watcher.take():
            return False
        self._listed_at = -_LIST_SECONDS
        return True

    def choices(self, now: float) -> list[Server]:
        """In the order to try them: the freer one of two, then the others as it happens."""
        servers = [(server, -1) for server in self._named] if not self.is_open else self._list(now)
        random.shuffle(servers)
        first = servers[:2]
        if len(servers) > 1:
            first.sort(key=lambda pair: _free_bytes(pair[0], pair[1], self._tls), reverse=True)
        return [server for server, _ in first + servers[2:]]

    def _list(self, now: float) -> list[tuple[Server, int]]:
        assert self._registry is not None
        if now - self._listed_at >= _LIST_SECONDS:
            entries = self._registry.entries(now + REACH_SECONDS)
            self._listed = [
                (parse_pool(entry.url).servers[0], entry.free_bytes if entry.capacity_bytes else -1)
                for entry in entries
            ]
            self._listed_at = now
        return list(self._listed)


def _free_bytes(server: Server, known_bytes: int, tls: Tls) -> int:
    """What a server says that it has free, asked if it is not known."""
    if known_bytes >= 0:
        return known_bytes
    deadline = time.monotonic() + REACH_SECONDS / 2
    try:
        addresses = addresses_of(server, deadline)
        return standing(Control(server, addresses, tls.toward(server, addresses)), deadline)[1]
    except (FarmemError, OSError):
        return -1


def _reach_all(
    servers: Sequence[Server], chunk: Chunk, deadline: float, means: Means
) -> tuple[list[PoolServer], list[FarmemError]]:
    """At the same time, so that one deadline does for all; what went wrong is in their order."""

    def reach(server: Server) -> PoolServer | FarmemError:
        try:
            return reach_server(server, chunk, deadline, means)
        except FarmemError as error:
            return error

    results = at_once([partial(reach, server) for server in servers])
    found = [result for result in results if isinstance(result, PoolServer)]
    return found, [result for result in results if isinstance(result, FarmemError)]


def _check_that_they_differ(servers: list[PoolServer]) -> None:
    """Two names of one export would be two places that overwrite each other."""
    known: dict[Way, str] = {}
    for server in servers:
        other = known.setdefault(server.way, server.url)
        if other is not server.url:
            raise FarmemError(
                f"pools {other!r} and {server.url!r} are the same memory", "name each server once"
            )
