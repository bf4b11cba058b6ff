"""`farmem serve`: the parts put together, from the start to the end of an epoch.

One thread, one loop, and nbdkit beside it.  SIGTERM drains: no new leases, and the end when
the last one has ended or the patience has; a second signal ends at once.  A part that fails
ends the server: its clients then know that their pages are lost, which is better than a
server that forgets leases or lends dirty memory.
"""

import asyncio
import contextlib
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, NamedTuple

from farmem import _native
from farmem.errors import FarmemError
from farmem.pool import memory
from farmem.pool.api import Api
from farmem.pool.directory import Directory, OwnRegistry
from farmem.pool.facts import Facts
from farmem.pool.http import HttpServer
from farmem.pool.leases import Leases, Quotas, Table
from farmem.pool.nbdkit import Door
from farmem.pool.notify import notify, watchdog_seconds
from farmem.pool.queuepairs import Wanted, open_queue_pairs
from farmem.pool.registrar import Registrar, advertised
from farmem.pool.sockets import Listen, Listener, Sockets
from farmem.pool.tls import Tls
from farmem.pools import EXTENT_BYTES, host_memory_bytes
from farmem.registry import Registry
from farmem.sizes import format_bytes, parse_size

TEST_VARIABLE = "FARMEM_TEST_POOL"
_EPOCH_BYTES = 8
_DRAIN_LOOK_SECONDS = 0.2
# systemd must not lose its patience (TimeoutStopSec) before we do: each look asks for so much more.
_DRAIN_EXTEND_US = 10_000_000
_NS = 1_000_000_000


class Settings(NamedTuple):
    """What was asked for, checked."""

    capacity_bytes: int
    listens: tuple[Listen, ...]
    name: str
    ttl_ns: int
    drain_ns: int
    quotas: Quotas
    data_port: int = 0
    has_huge_pages: bool = False
    tls: Tls = Tls()
    rdma: Wanted = Wanted()
    is_quiet: bool = False
    keeps_registry: bool = False
    registries: tuple[Registry, ...] = ()  # where it registers itself
    advertise: str = ""  # the URL that it registers; empty: where it listens


class TestSettings(NamedTuple):
    """What only a test wants: named defects, and addresses that are soon lent again."""

    defects: int = 0
    space_bytes: int = memory.SPACE_BYTES


def test_settings() -> TestSettings:
    """FARMEM_TEST_POOL=DEFECT,...,space=SIZE."""
    found = TestSettings()
    known: dict[str, int] = _native.ffi.typeof("enum fm_lease_defect").relements
    for word in filter(None, os.environ.get(TEST_VARIABLE, "").split(",")):
        if word.startswith("space="):
            found = found._replace(space_bytes=parse_size(word.removeprefix("space=")))
            continue
        defect = known.get(f"FM_LEASE_DEFECT_{word.upper()}", 0)
        if not defect:
            names = sorted(name.removeprefix("FM_LEASE_DEFECT_").lower() for name in known)
            raise FarmemError(f"there is no defect {word!r}", f"defects are: {', '.join(names)}")
        found = found._replace(defects=found.defects | defect)
    return found


def check_capacity(settings: Settings) -> None:
    """What is promised must be there."""
    wanted = format_bytes(settings.capacity_bytes)
    if settings.capacity_bytes < EXTENT_BYTES:
        raise FarmemError(
            f"--capacity is {wanted}, and {format_bytes(EXTENT_BYTES)} are the least",
            "lend more, as --capacity 8G",
        )
    if settings.has_huge_pages:
        there_bytes = memory.huge_pages_bytes()
        hint = "set more aside: sysctl vm.nr_hugepages=N (of 2 MiB each), or lend less"
        what = "in huge pages"
    else:
        there_bytes, hint, what = host_memory_bytes(), "lend less, as --capacity 1G", "of memory"
    if settings.capacity_bytes > there_bytes:
        raise FarmemError(
            f"--capacity is {wanted}, and this host has {format_bytes(there_bytes)} {what}", hint
        )


class Server:
    """One epoch: made in a running loop, served by run()."""

    def __init__(self, settings: Settings) -> None:
        check_capacity(settings)
        for_tests = test_settings()
        self.settings = settings
        self._memory = memory.Memory(settings.has_huge_pages, for_tests.space_bytes)
        table = Table(settings.has_huge_pages, for_tests.defects)
        self.leases = Leases(
            settings.capacity_bytes // EXTENT_BYTES * EXTENT_BYTES,
            settings.ttl_ns,
            settings.quotas,
            self._memory,
            table,
        )
        self.sockets = Sockets(settings.data_port)
        self.facts = Facts(
            settings.name, secrets.token_hex(_EPOCH_BYTES), self.leases, [], settings.is_quiet
        )
        self.facts.queue_pairs = open_queue_pairs(settings.rdma, self.leases)
        registries = settings.registries
        if settings.keeps_registry:
            self.facts.directory = Directory()
            registries = (OwnRegistry(self.facts.directory), *registries)
        self._registrar = Registrar(self.facts, registries)
        self._http = HttpServer(Api(self.facts).answer, settings.tls)
        self._signals = 0
        self._signalled = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Everything is up inside of this, and gone behind it."""
        self.sockets.open(self.settings.listens, self.settings.tls.mode)
        try:
            pairs, tls = self.sockets.listeners, self.settings.tls
            plain = [pair for pair in pairs if pair.is_unix or not tls.is_offered]
            await self._open_door(plain, Tls())
            await self._open_door([pair for pair in pairs if pair not in plain], tls)
            await self._http.start(self.sockets.listeners)
            yield
        finally:
            await self._http.stop()
            for door in self.facts.doors:
                await door.stop()
            if self.facts.queue_pairs:
                self.facts.queue_pairs.close()
            self.sockets.close()

    async def _open_door(self, pairs: list[Listener], tls: Tls) -> None:
        """An nbdkit for some of the sockets: TLS is all of its sockets' or none's."""
        data = list({id(pair.data): pair.data for pair in pairs}.values())
        if data:
            index = len(self.doors)
            self.doors.append(Door(index, data, self._memory, self.leases.table, tls))
            await self.doors[index].start()

    async def run(self) -> None:
        """Serve until a signal says otherwise."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        async with self.serving():
            self._announce()
            url = self.settings.advertise or advertised(self.sockets.listeners)
            registering = asyncio.ensure_future(self._registrar.run(url))
            try:
                await self.while_all_is_well(self._until_drained())
            finally:
                notify("STOPPING=1")
                self._registrar.stop()
                await registering

    async def while_all_is_well(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something to its end, unless a part of the server fails first."""
        parts = [self.leases.reclaim(), self._expire(), self._watchdog(), self._http.accepting()]
        parts += map(_watch, self.doors)
        first = asyncio.ensure_future(work)
        tasks = [first, *map(asyncio.ensure_future, parts)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            assert first in done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def doors(self) -> list[Door]:
        """The data plane's processes."""
        return self.facts.doors

    def _announce(self) -> None:
        lent = format_bytes(self.leases.capacity_bytes)
        self.facts.say(f"lending {lent} as {self.facts.name!r}, epoch {self.facts.epoch}")
        for listener in self.sockets.listeners:
            data = listener.data_path or f"port {listener.data_port}"
            self.facts.say(f"listening on {listener.url()}, data on {data}")
        if self.facts.queue_pairs:
            self.facts.say(f"RDMA through {self.facts.queue_pairs.adapter}")
        notify("READY=1", f"STATUS=lending {lent}")

    def _on_signal(self) -> None:
        self._signals += 1
        self._signalled.set()

    async def _until_drained(self) -> None:
        await self._signalled.wait()
        self.leases.is_draining = True
        self._registrar.stop()
        notify("STOPPING=1", "STATUS=draining")
        seconds = self.settings.drain_ns / _NS
        end = time.monotonic() + seconds
        if self.leases.live:
            self.facts.say(
                f"draining: waiting up to {seconds:g} s for {len(self.leases.live)} leases; "
                "another signal ends at once"
            )
        while self.leases.live and self._signals < 2 and time.monotonic() < end:
            notify(f"EXTEND_TIMEOUT_USEC={_DRAIN_EXTEND_US}")
            await asyncio.sleep(_DRAIN_LOOK_SECONDS)
        if self.leases.live:
            lost = format_bytes(sum(lease.size_bytes for lease in self.leases.live))
            print(
                f"farmem: warning: {len(self.leases.live)} leases ({lost}) end with this server",
                file=sys.stderr,
                flush=True,
            )

    async def _expire(self) -> None:
        while True:
            for lease in self.leases.expire(time.monotonic_ns()):
                self.facts.say(f"lease {lease.id}: expired, nobody has renewed it")
            await asyncio.sleep(self.leases.tick_seconds)

    async def _watchdog(self) -> None:
        """That this loop runs is what systemd wants to know.  nbdkit is looked after by us."""
        seconds = watchdog_seconds()
        while seconds:
            notify("WATCHDOG=1")
            await asyncio.sleep(seconds)
        await asyncio.Event().wait()


async def _watch(door: Door) -> None:
    await door.failed


def _allow_descriptors() -> None:
    """As many as we may have: each connection is one, in nbdkit as well, which inherits this."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def serve(settings: Settings) -> None:
    """A server, from its start to its end."""
    _allow_descriptors()
    await Server(settings).run()
