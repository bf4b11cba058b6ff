"""Leases: who was lent how much, until when, and what happens when that is over.

A lease that ends (released or expired) lets nobody in any more at once; its memory is lent
again only when no device can reach it, the last access has left, and it has been cleared.
Until then it counts as lent.  All of it runs in the loop's one thread.
"""

import asyncio
import hmac
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

from farmem import _native
from farmem.pool.memory import Exhausted, Memory
from farmem.pools import EXTENT_BYTES
from farmem.sizes import BYTES_MAX, format_bytes

if TYPE_CHECKING:
    from farmem.pool.queuepairs import Registered

ffi, lib = _native.ffi, _native.lib

ID_BYTES = 8
_NS = 1_000_000_000
# How often is looked for leases that have run out, and whether those inside have left.
TICK_SECONDS_MAX = 1.0
_LEAVE_SECONDS = 0.005
# Whoever renews while this process did not run (stopped, a suspended host) must not lose by it.
_LATE_NS = _NS // 2
COUNTERS = (
    "reads", "writes", "trims", "read_bytes", "written_bytes", "trimmed_bytes", "errors",
)  # fmt: skip


class Refused(Exception):
    """What a client is told: a status of HTTP, what was wrong, and what to do instead."""

    def __init__(self, status: int, what: str, hint: str = "", reason: str = "") -> None:
        super().__init__(what)
        self.status = status
        self.what = what
        self.hint = hint
        self.reason = reason  # a word, for the metrics


class Quotas(NamedTuple):
    """How much each tenant may have at once; 0: as much as there is."""

    default_bytes: int
    by_tenant: dict[str, int]

    def of(self, tenant: str) -> int:
        """A tenant's quota."""
        return self.by_tenant.get(tenant, self.default_bytes) or BYTES_MAX


class Lease:
    """Memory that is lent to a job."""

    def __init__(self, tenant: str, job: str, size_bytes: int) -> None:
        self.id = secrets.token_hex(ID_BYTES)
        self.token = secrets.token_hex(lib.FM_LEASE_TOKEN_BYTES // 2)
        self.tenant = tenant
        self.job = job
        self.size_bytes = size_bytes
        self.offset = 0
        self.place = lib.FM_LEASE_NONE
        self.deadline_ns = 0
        self.registered: Registered | None = None  # what lets a device reach the memory
        self.registering = asyncio.Lock()

    def withdraw(self) -> None:
        """Behind this no device can reach its memory."""
        if self.registered is not None:
            self.registered.close()
            self.registered = None

    def fits(self, token: str) -> bool:
        """Whether this is its token; the time that it takes tells nothing."""
        return hmac.compare_digest(self.token.encode(), token.encode(errors="replace"))


class Table:
    """The lease table: memory that nbdkit has too."""

    def __init__(self, has_huge_pages: bool, defects: int) -> None:
        from farmem.job import Memory as Shared

        self._shared = Shared("farmem-leases", ffi.sizeof("struct fm_lease_table"))
        self.fd = self._shared.fd
        self.struct: Any = ffi.cast("struct fm_lease_table *", self._shared.pointer)
        flags = lib.FM_LEASE_HUGE_PAGES if has_huge_pages else 0
        lib.fm_lease_table_init(self.struct, flags, defects)


class Leases:
    """All leases of a server."""

    def __init__(
        self, capacity_bytes: int, ttl_ns: int, quotas: Quotas, memory: Memory, table: Table
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.ttl_ns = ttl_ns
        self.memory = memory
        self.table = table
        self.is_draining = False
        self.granted = 0
        self.ended = {"released": 0, "expired": 0}
        self.refused: dict[str, int] = {}
        self._quotas = quotas
        self._live: dict[str, Lease] = {}
        self._ending: list[Lease] = []
        self._kept: list[Registered | None] = []  # a defect's: what should have been taken away
        self._past = dict.fromkeys(COUNTERS, 0)
        self._wake = asyncio.Event()
        self._looked_ns = 0

    @property
    def live(self) -> list[Lease]:
        """Those that are lent now."""
        return list(self._live.values())

    @property
    def held(self) -> list[Lease]:
        """Those whose memory can't be lent again yet."""
        return [*self._live.values(), *self._ending]

    @property
    def clearing_bytes(self) -> int:
        """What has come back and can't be lent again yet."""
        return sum(lease.size_bytes for lease in self._ending)

    @property
    def free_bytes(self) -> int:
        """What a lease could have now, at most."""
        free_bytes = self.capacity_bytes - self.memory.taken_bytes
        free_bytes = min(free_bytes, self.memory.can_promise_bytes())
        return max(free_bytes, 0) // EXTENT_BYTES * EXTENT_BYTES

    def of_tenant(self, tenant: str) -> int:
        """The bytes that a tenant has."""
        return sum(lease.size_bytes for lease in self._live.values() if lease.tenant == tenant)

    def grant(self, size_bytes: int, tenant: str, job: str, now_ns: int) -> Lease:
        """Lend memory, or say why not: what is granted is never taken back before its time."""
        try:
            lease = self._grant(size_bytes, tenant, job)
        except Refused as refusal:
            self.refused[refusal.reason] = self.refused.get(refusal.reason, 0) + 1
            raise
        lease.deadline_ns = now_ns + self.ttl_ns
        self._live[lease.id] = lease
        self.granted += 1
        return lease

    def _grant(self, size_bytes: int, tenant: str, job: str) -> Lease:
        if self.is_draining:
            raise Refused(503, "this server is draining", "ask another one", "draining")
        whole_bytes = -(-size_bytes // EXTENT_BYTES) * EXTENT_BYTES
        left_bytes = self._quotas.of(tenant) - self.of_tenant(tenant)
        if whole_bytes > left_bytes:
            raise Refused(
                403,
                f"tenant {tenant!r} may have {format_bytes(max(left_bytes, 0))} more here, "
                f"not {format_bytes(whole_bytes)}",
                "ask for less, or have the quota raised (farmem serve --quota)",
                "quota",
            )
        lease = Lease(tenant, job, whole_bytes)
        if whole_bytes > self.capacity_bytes - self.memory.taken_bytes:
            raise self._full(whole_bytes, "")
        try:
            lease.offset = self.memory.take(whole_bytes)
        except Exhausted as error:
            raise self._full(whole_bytes, f": {error}") from error
        token = lease.token.encode()
        place = lib.fm_lease_grant(self.table.struct, token, lease.offset, whole_bytes)
        if place == lib.FM_LEASE_NONE:
            self.memory.give_back(lease.offset, whole_bytes)
            raise Refused(507, "this server has no more leases to give", "ask another one", "full")
        lease.place = place
        return lease

    def _full(self, wanted_bytes: int, why: str) -> Refused:
        free_bytes = self.free_bytes
        return Refused(
            507,
            f"this server has {format_bytes(free_bytes)} free, "
            f"not {format_bytes(wanted_bytes)}{why}",
            f"ask for at most {free_bytes} bytes, or ask another server",
            "full",
        )

    def find(self, lease_id: str, token: str) -> Lease:
        """A lease, for whoever has its token."""
        lease = self._live.get(lease_id)
        if lease is None:
            raise Refused(404, "there is no such lease: it has ended", "ask for a new one")
        if not lease.fits(token):
            raise Refused(401, "this is not the lease's token", "send: Authorization: Bearer TOKEN")
        return lease

    def renew(self, lease: Lease, now_ns: int) -> None:
        """It lives for another TTL."""
        lease.deadline_ns = now_ns + self.ttl_ns

    def end(self, lease: Lease, reason: str) -> None:
        """From here on nobody gets in; the rest is reclaim()'s."""
        del self._live[lease.id]
        lib.fm_lease_end(self.table.struct, lease.place)
        self.ended[reason] += 1
        self._ending.append(lease)
        self._wake.set()

    def expire(self, now_ns: int) -> list[Lease]:
        """End those that have run out.  Called every tick."""
        late_ns = now_ns - self._looked_ns - int(self.tick_seconds * _NS)
        if self._looked_ns and late_ns > _LATE_NS:
            for lease in self._live.values():
                lease.deadline_ns += late_ns
        self._looked_ns = now_ns
        over = [lease for lease in self._live.values() if lease.deadline_ns <= now_ns]
        for lease in over:
            self.end(lease, "expired")
        return over

    @property
    def tick_seconds(self) -> float:
        """How often expire() is to be called."""
        return min(TICK_SECONDS_MAX, self.ttl_ns / _NS / 10)

    async def reclaim(self) -> None:
        """Clear what has come back, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._ending:
                for lease in self._ending:
                    self._withdraw(lease)
                for lease in [lease for lease in self._ending if self._has_been_left(lease)]:
                    await self._clear(lease)
                await asyncio.sleep(_LEAVE_SECONDS if self._ending else 0)

    def _withdraw(self, lease: Lease) -> None:
        """First of all: under a device that reaches it memory would not stay cleared."""
        if self.table.struct.defects & lib.FM_LEASE_DEFECT_KEEP_REGISTRATION:
            self._kept.append(lease.registered)
            lease.registered = None
        lease.withdraw()

    def _has_been_left(self, lease: Lease) -> bool:
        if self.table.struct.defects & lib.FM_LEASE_DEFECT_NO_DRAIN:
            return True
        return bool(lib.fm_lease_in_flight(self.table.struct, lease.place) == 0)

    async def _clear(self, lease: Lease) -> None:
        if not self.table.struct.defects & lib.FM_LEASE_DEFECT_KEEP_BYTES:
            for _ in self.memory.clear(lease.offset, lease.size_bytes):
                await asyncio.sleep(0)
        counters = self.table.struct.leases[lease.place].counters
        for name in COUNTERS:
            self._past[name] += getattr(counters, name)
        lib.fm_lease_free(self.table.struct, lease.place)
        self.memory.give_back(lease.offset, lease.size_bytes)
        self._ending.remove(lease)

    def counters(self) -> dict[str, int]:
        """What all leases together have transferred, ended ones included."""
        total = dict(self._past)
        for lease in self.held:
            counters = self.table.struct.leases[lease.place].counters
            for name in COUNTERS:
                total[name] += getattr(counters, name)
        return total
