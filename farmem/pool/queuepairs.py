"""Leases over RDMA: which leases are registered, who has queue pairs, and what is asked for.

A lease is registered when its first queue pair is asked for: all its pages are brought and stay
(pinned), so what was promised is there from then on.  What the device can reach is taken away
from it in Registered.close(), which leases.py calls before the memory is cleared.
"""

import asyncio
import contextlib
import errno
import ipaddress
import mmap
import resource
import secrets
import sys
import time
from typing import Any, NamedTuple

from farmem import _native
from farmem.errors import FarmemError
from farmem.pool.leases import Lease, Leases, Refused
from farmem.pool.memory import PIECE_BYTES
from farmem.pool.rdma import (
    ETHERNET,
    INFINIBAND,
    MTUS,
    NUMBER_BITS,
    RETRIES,
    Adapter,
    Failed,
    Half,
    NotThere,
    Registration,
    canonical_gid,
    open_adapter,
    short_gid,
)
from farmem.sizes import format_bytes

ffi, lib = _native.ffi, _native.lib

OFF, ON, REQUIRE = "off", "on", "require"
PER_LEASE_MAX = 256
NAME_BYTES = 8
# For the queues of queue pairs, beside the memory that is lent.
LOCKED_BYTES_MORE = 64 << 20
_CAP_IPC_LOCK = 14
_LEAVE_SECONDS = 5.0
_LOOK_SECONDS = 0.001
_LID_MAX = 0xBFFF
_QPN_MIN = 2  # the first two are the fabric's own
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap yet
_EXAMPLE = (
    'send JSON, as {"qpn": 17, "psn": 4711, "gid": "::ffff:10.0.0.7", "lid": 0, "mtu": 4096, '
    '"link": "ethernet"}'
)


class Wanted(NamedTuple):
    """What was asked for; an empty mode: RDMA where there is a device."""

    mode: str = ""
    device: str = ""
    gid_index: int | None = None


def check_wanted(mode: str, device: str, gid_index: int | None) -> Wanted:
    """What goes together.  Who names a device means it."""
    is_named = bool(device) or gid_index is not None
    if mode == OFF and is_named:
        raise FarmemError(
            "--rdma=off, and a device or a GID index is named",
            "say --rdma=require, or leave it out",
        )
    return Wanted(mode or (REQUIRE if is_named else ""), device, gid_index)


def open_queue_pairs(wanted: Wanted, leases: Leases) -> "QueuePairs | None":
    """RDMA, if it is wanted and can be had."""
    if wanted.mode == OFF:
        return None
    try:
        adapter = open_adapter(wanted.device, wanted.gid_index)
        check_locked_memory(leases.capacity_bytes)
    except FarmemError as error:
        if wanted.mode == REQUIRE:
            raise
        if wanted.mode == ON or not isinstance(error, NotThere):
            print(f"farmem: warning: no RDMA: {error}", file=sys.stderr, flush=True)
        return None
    return QueuePairs(adapter, leases)


def check_locked_memory(capacity_bytes: int) -> None:
    """Registered memory is pinned, and the kernel counts that against a limit."""
    wanted_bytes = capacity_bytes + LOCKED_BYTES_MORE
    soft, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != most:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    if most == resource.RLIM_INFINITY or most >= wanted_bytes or _may_lock_all():
        return
    raise FarmemError(
        f"{format_bytes(most)} of memory may be locked (RLIMIT_MEMLOCK), and RDMA needs "
        f"{format_bytes(wanted_bytes)}",
        f"raise it: ulimit -l {wanted_bytes >> 10} (systemd: LimitMEMLOCK=infinity), or lend less",
    )


def _may_lock_all() -> bool:
    """CAP_IPC_LOCK: the limit does not count."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def half_in(asked: dict[str, Any], link: str) -> Half:
    """A client's half of a queue pair, every word of it checked."""
    theirs = asked.get("link")
    if theirs not in (ETHERNET, INFINIBAND):
        raise Refused(400, f"link must be {ETHERNET} or {INFINIBAND}", _EXAMPLE)
    if theirs != link:
        raise Refused(
            400, f"your link is {theirs}, and this server's is {link}", "use a device of that kind"
        )
    mtu = asked.get("mtu")
    if not isinstance(mtu, int) or mtu not in MTUS:
        raise Refused(400, f"mtu must be one of {', '.join(map(str, MTUS))}", _EXAMPLE)
    gid = asked.get("gid")
    try:
        if not isinstance(gid, str):
            raise ValueError("no text")
        gid = canonical_gid(gid)
    except ValueError as error:
        raise Refused(400, "gid is no GID, written as an IPv6 address", _EXAMPLE) from error
    if link == ETHERNET and ipaddress.IPv6Address(gid).is_unspecified:
        raise Refused(400, "gid is all zeros", _EXAMPLE)
    return Half(
        qpn=_number_in(asked, "qpn", _QPN_MIN, (1 << NUMBER_BITS) - 1),
        psn=_number_in(asked, "psn", 0, (1 << NUMBER_BITS) - 1),
        gid=gid,
        lid=_number_in(asked, "lid", int(link == INFINIBAND), _LID_MAX),
        mtu=mtu,
    )


def _number_in(asked: dict[str, Any], key: str, least: int, most: int) -> int:
    found = asked.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
        raise Refused(400, f"{key} must be a whole number from {least} to {most}", _EXAMPLE)
    return found


class Registered:
    """A lease's memory, mapped here, and its registration."""

    def __init__(self, fd: int, offset: int, size_bytes: int) -> None:
        self._mapping = mmap.mmap(fd, size_bytes, offset=offset)
        self._mapping.madvise(mmap.MADV_DONTFORK)
        self._view = ffi.from_buffer(self._mapping)
        self.address = int(ffi.cast("uintptr_t", self._view))
        self.registration: Registration | None = None

    def populate(self, start: int, length: int) -> None:
        """Bring pages; a kernel that does not know how brings them when they are registered."""
        try:
            self._mapping.madvise(_MADV_POPULATE_WRITE, start, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def close(self) -> None:
        """Queue pairs to error and away, the registration away: the device has let go."""
        if self.registration is not None:
            self.registration.close()
            self.registration = None
        ffi.release(self._view)
        self._mapping.close()


class QueuePairs:
    """The server's side of RDMA."""

    def __init__(self, adapter: Adapter, leases: Leases) -> None:
        self.adapter = adapter
        self._leases = leases

    @property
    def _registrations(self) -> list[Registration]:
        held = [lease.registered for lease in self._leases.held]
        return [found.registration for found in held if found and found.registration]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self._registrations))

    @property
    def registered_bytes(self) -> int:
        """The memory that the device can reach."""
        return sum(found.size_bytes for found in self._registrations)

    def about(self) -> dict[str, Any]:
        """What a client wants to know before it makes its half."""
        adapter = self.adapter
        return {"link": adapter.link, "gid": short_gid(adapter.gid.text), "mtu": adapter.mtu}

    async def connect(self, lease_id: str, token: str, asked: dict[str, Any]) -> dict[str, Any]:
        """A queue pair to a lease's memory, for whoever has its token."""
        lease = self._leases.find(lease_id, token)
        theirs = half_in(asked, self.adapter.link)
        async with lease.registering:
            lease = self._leases.find(lease_id, token)
            if lease.registered is None:
                await self._register(lease)
        # It may have ended meanwhile.  From here on nobody comes in between.
        registered = self._leases.find(lease_id, token).registered
        assert registered is not None and registered.registration is not None
        registration = registered.registration
        if len(registration) >= PER_LEASE_MAX or self.count >= self.adapter.queue_pairs_max:
            raise Refused(
                507, "there are too many queue pairs", "take away those that nobody uses (DELETE)"
            )
        name = secrets.token_hex(NAME_BYTES)
        try:
            ours = registration.connect(name, theirs)
        except Failed as error:
            raise _refusal(error) from error
        return {
            "queue_pair": name,
            **ours._asdict(),
            "gid": short_gid(ours.gid),
            "link": self.adapter.link,
            "rkey": registration.rkey,
            "address": registered.address,
            "bytes": lease.size_bytes,
            "retry_count": RETRIES,
            "reads_in_flight": self.adapter.reads_max,
        }

    def disconnect(self, lease: Lease, name: str) -> None:
        """Take one away."""
        found = lease.registered
        try:
            is_gone = found and found.registration and found.registration.disconnect(name)
        except Failed as error:
            raise Refused(
                500, f"the queue pair can't be taken away: {error}", "end the lease"
            ) from error
        if not is_gone:
            raise Refused(404, "the lease has no such queue pair", "name one that POST gave")

    async def _register(self, lease: Lease) -> None:
        """Bring the lease's pages, a piece at a time, and hand them to the device."""
        lib.fm_lease_pin(self._leases.table.struct, lease.place)
        await self._until_nobody_is_inside(lease)
        try:
            made = Registered(self._leases.memory.fd, lease.offset, lease.size_bytes)
            try:
                await self._populate(lease, made)
                made.registration = self.adapter.register(made.address, lease.size_bytes)
            except BaseException:
                made.close()
                raise
        except (OSError, Failed) as error:
            raise Refused(
                507,
                f"{format_bytes(lease.size_bytes)} can't be registered with the RDMA device: "
                f"{error}",
                "ask for a smaller lease, or have the server's RLIMIT_MEMLOCK raised",
            ) from error
        lease.registered = made

    async def _populate(self, lease: Lease, made: Registered) -> None:
        """Others have their turns in between; a lease that ends meanwhile gets no more pages."""
        for start in range(0, lease.size_bytes, PIECE_BYTES):
            made.populate(start, min(PIECE_BYTES, lease.size_bytes - start))
            await asyncio.sleep(0)
            self._leases.find(lease.id, lease.token)

    async def _until_nobody_is_inside(self, lease: Lease) -> None:
        """Whoever was before the pin may still be about to make a hole."""
        end = time.monotonic() + _LEAVE_SECONDS
        while lib.fm_lease_in_flight(self._leases.table.struct, lease.place):
            if time.monotonic() > end:
                raise Refused(
                    409, "the lease is busy over NBD", "end its data connections, and ask again"
                )
            await asyncio.sleep(_LOOK_SECONDS)
            self._leases.find(lease.id, lease.token)

    def close(self) -> None:
        """At the server's end."""
        for lease in self._leases.held:
            lease.withdraw()
        self.adapter.close()


def _refusal(error: Failed) -> Refused:
    if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EAGAIN):
        return Refused(
            507, f"the RDMA device has no queue pair left: {error}", "try another server"
        )
    return Refused(
        400,
        f"there is no way to your queue pair: {error}",
        "see that its GID is an address of the network that the server's is of (GET /v1/server)",
    )
