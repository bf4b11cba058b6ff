"""The slots of a job's ledger as the supervisor keeps them: given out, summed up, given back.

A slot's state is changed by compare-and-swap, because engines reserve slots for the
children they fork at the same time.  Everything else in a slot that is not FREE belongs
to its process until that has died.
"""

import threading
import time
from typing import Any

from farmem import _native
from farmem.job import Job

ffi, lib = _native.ffi, _native.lib

# How long the child of a dead parent may take to say hello before its slot is given back:
# long for a child that was just forked, short for a job that waits to end.
FORKING_GRACE_NS = 2_000_000_000
# What is shown of each process; the rest only as the job's sums.
_MEMBER_COUNTERS = (
    "peak_local_bytes",
    "managed_bytes",
    "engine_bytes",
    "pages_fetched",
    "pages_evicted",
    "stall_ns",
)


def _command_of(pid: int) -> str:
    """The kernel's name for a process.  Not its command line: to read that is to read its
    memory, and could mean to wait for a page of it."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""  # it has just gone


class Trimmer:
    """Returns what the dead had in the pool to the system: it can take long, so in a thread."""

    def __init__(self, job: Job) -> None:
        self._ledger: Any = job.ledger.pointer
        self._pool_fd = job.pool.fd
        self._bell = threading.Event()
        self._started = False

    def ring(self) -> None:
        """A process has been reaped."""
        self._bell.set()
        if not self._started:
            self._started = True
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._bell.wait()
            self._bell.clear()
            lib.fm_pool_ledger_trim_reaped(self._ledger, self._pool_fd)


class Slots:
    """The ledger of one job."""

    def __init__(self, job: Job) -> None:
        self._control: Any = job.control
        self._ledger: Any = job.ledger.pointer
        self._trimmer = Trimmer(job)
        self._in_use: set[int] = set()
        self._orphans: dict[int, int] = {}
        self._names = [name for name, _ in ffi.typeof("struct fm_counters").fields]
        self._totals = dict.fromkeys(self._names, 0)
        self.fault_names = [name for name in self._names if name.startswith("faults_")]
        self.peak_local_bytes = 0

    def _state(self, slot: int) -> Any:
        return ffi.addressof(self._control.procs[slot], "state")

    def take(self, pid: int) -> int | None:
        """A free slot for a process; None: the ledger is full."""
        for slot in range(lib.FM_PROCS_MAX):
            if self._bind(slot, lib.FM_PROC_FREE, pid):
                self._raise_high(slot + 1)
                return slot
        return None

    def _raise_high(self, count: int) -> None:
        """Engines look at no slot beyond the highest that was ever used; they raise it as well."""
        high: Any = ffi.addressof(self._control, "procs_high")
        while high[0] < count and not lib.fm_word_swap(high, high[0], count):
            pass

    def take_reserved(self, slot: int, pid: int) -> bool:
        """The slot that a parent reserved for this child; False: it is not reserved (any more)."""
        return slot < lib.FM_PROCS_MAX and self._bind(slot, lib.FM_PROC_FORKING, pid)

    def _bind(self, slot: int, state: int, pid: int) -> bool:
        if not lib.fm_word_swap(self._state(slot), state, lib.FM_PROC_LIVE):
            return False
        self._control.procs[slot].pid = pid
        self._in_use.add(slot)
        self._orphans.pop(slot, None)
        return True

    def is_adopted(self, slot: int) -> bool:
        """Whether memory became short for the slot's process."""
        return bool(self._control.procs[slot].adopted)

    def give_back(self, slot: int) -> None:
        """The process is gone: keep its counters, release what it held, free the slot."""
        proc = self._control.procs[slot]
        self.sample()
        for name in self._names:
            self._totals[name] += getattr(proc.counters, name)
        self.peak_local_bytes = max(self.peak_local_bytes, proc.counters.peak_local_bytes)
        proc.state = lib.FM_PROC_DEAD
        if proc.adopted:
            lib.fm_pool_ledger_reap(self._ledger, slot, 1)
            self._trimmer.ring()
        # All but the state first: a slot that reads FREE must be empty.
        ffi.buffer(ffi.addressof(proc))[4:] = bytes(ffi.sizeof("struct fm_proc") - 4)
        lib.fm_word_swap(self._state(slot), lib.FM_PROC_DEAD, lib.FM_PROC_FREE)
        self._in_use.discard(slot)

    @property
    def has_orphans(self) -> bool:
        """Whether slots are reserved by parents that are known to have died."""
        return bool(self._orphans)

    def release_orphans(self) -> bool:
        """Free the slots reserved by parents that have died; True while some are waited for."""
        now_ns = time.monotonic_ns()
        for slot in range(lib.FM_PROCS_MAX):
            proc = self._control.procs[slot]
            if proc.state != lib.FM_PROC_FORKING or proc.parent_slot in self._in_use:
                self._orphans.pop(slot, None)
                continue
            since_ns = self._orphans.setdefault(slot, now_ns)
            forking, dead = lib.FM_PROC_FORKING, lib.FM_PROC_DEAD
            if now_ns - since_ns > FORKING_GRACE_NS and lib.fm_word_swap(
                self._state(slot), forking, dead
            ):
                del self._orphans[slot]
                self.give_back(slot)
        return bool(self._orphans)

    def sample(self) -> None:
        """Note the job's local memory if it is more than ever before."""
        local_bytes = sum(self._control.procs[slot].local_bytes for slot in self._in_use)
        self.peak_local_bytes = max(self.peak_local_bytes, local_bytes)

    def totals(self) -> dict[str, int]:
        """The counters of every process that there is or was, summed; the peak is the job's."""
        live = [self._control.procs[slot].counters for slot in self._in_use]
        totals = {
            name: gone + sum(getattr(counters, name) for counters in live)
            for name, gone in self._totals.items()
        }
        return {**totals, "peak_local_bytes": self.peak_local_bytes}

    def members(self) -> list[dict[str, Any]]:
        """The processes that there are now, and how each of them stands."""
        found = []
        for slot in sorted(self._in_use):
            proc = self._control.procs[slot]
            counters = proc.counters
            is_adopted = proc.state == lib.FM_PROC_ADOPTED
            member = {
                "pid": proc.pid,
                "command": _command_of(proc.pid),
                "state": "adopted" if is_adopted else "watched",
                "local_bytes": proc.local_bytes,
                "remote_bytes": proc.remote_bytes,
                "faults": sum(getattr(counters, name) for name in self.fault_names),
            }
            member |= {name: getattr(counters, name) for name in _MEMBER_COUNTERS}
            found.append(member)
        return found

    def pool_stored_bytes(self) -> int:
        """What is in the pool now."""
        pages: int = lib.fm_pool_ledger_used(self._ledger)
        return pages * int(lib.FM_PAGE_BYTES)

    def pool_capacity_bytes(self) -> int:
        """How large the pool is; one on servers grows."""
        return int(lib.fm_pool_ledger_capacity(self._ledger))

    def pool_peak_bytes(self) -> int:
        """The most that was ever in the pool."""
        pages: int = lib.fm_pool_ledger_peak(self._ledger)
        return pages * int(lib.FM_PAGE_BYTES)
