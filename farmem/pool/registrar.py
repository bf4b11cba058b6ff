"""A server says in registries that it lends memory, as long as it grants leases.

What goes wrong is said once, and tried again; a registry that is away never holds the server up.
"""

import asyncio
import contextlib
import socket
import time

from farmem.errors import FarmemError
from farmem.pool.directory import OwnRegistry
from farmem.pool.facts import Facts
from farmem.pool.sockets import Listener
from farmem.registry import Entry, Registry
from farmem.servers import REACH_SECONDS

TTL_SECONDS_MAX = 15.0
_RENEWALS = 3  # in the time that an entry lives
_WITHDRAW_SECONDS = 2.0
_NS = 1_000_000_000
_ANY = ("0.0.0.0", "::")


def advertised(listeners: list[Listener]) -> str:
    """Where others reach it: the first address for TCP; any address is this host's name."""
    urls = [listener.url() for listener in listeners]
    tcp = [listener.control for listener in listeners if not listener.is_unix]
    if not tcp:
        return urls[0]
    host, port = tcp[0].getsockname()[:2]
    if host in _ANY:
        return f"tcp://{socket.gethostname()}:{port}"
    return next(url for url in urls if url.startswith("tcp://"))


class Registrar:
    """Registers one server in some registries."""

    def __init__(self, facts: Facts, registries: tuple[Registry, ...]) -> None:
        self._facts = facts
        self._registries = registries
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """No more leases are granted."""
        self._stopped.set()

    async def run(self, url: str) -> None:
        """Until it is stopped; then nothing is registered any more."""
        await asyncio.gather(*(self._keep(registry, url) for registry in self._registries))

    def _entry(self, url: str) -> Entry:
        facts = self._facts
        sizes = (facts.leases.capacity_bytes, facts.leases.free_bytes)
        return Entry(facts.epoch, url, facts.name, facts.epoch, *sizes)

    async def _keep(self, registry: Registry, url: str) -> None:
        ttl_seconds = min(TTL_SECONDS_MAX, self._facts.leases.ttl_ns / _NS)
        is_registered, told = False, ""
        while not self._stopped.is_set():
            try:
                await self._tell(registry, self._entry(url), ttl_seconds, is_registered)
                if not is_registered or told:
                    self._facts.say(f"registered as {url} in registry {registry.url}")
                is_registered, told = True, ""
            except FarmemError as error:
                if told != error.what:
                    self._facts.say(f"can't be registered: {error.what}")
                told = error.what
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), ttl_seconds / _RENEWALS)
        if is_registered:
            await self._withdraw(registry, self._entry(url))

    @staticmethod
    async def _tell(
        registry: Registry, entry: Entry, ttl_seconds: float, is_registered: bool
    ) -> None:
        call = registry.renew if is_registered else registry.register
        deadline = time.monotonic() + min(REACH_SECONDS, ttl_seconds)
        if isinstance(registry, OwnRegistry):
            call(entry, ttl_seconds, deadline)
        else:
            await asyncio.to_thread(call, entry, ttl_seconds, deadline)

    @staticmethod
    async def _withdraw(registry: Registry, entry: Entry) -> None:
        deadline = time.monotonic() + _WITHDRAW_SECONDS
        with contextlib.suppress(FarmemError):  # it ends by itself
            if isinstance(registry, OwnRegistry):
                registry.withdraw(entry, deadline)
            else:
                await asyncio.to_thread(registry.withdraw, entry, deadline)
