"""The budget of a process's regions: how much of them may be here, and where the rest goes.

One per process, because there is one engine.  The first one starts the job; in a program
that `farmem run` has started it is the job's and can't be changed from here.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from farmem import _native, checks
from farmem.engine import Engine
from farmem.errors import FarmemError
from farmem.sizes import BYTES_MAX, format_bytes, parse_size

lib = _native.lib

_lock = threading.Lock()
_engine: Engine | None = None
_current: "Budget | None" = None

# A child of a fork must not find the lock held by a thread that it has not got.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
)


def size_of(value: int | str, what: str) -> int:
    """Bytes of a number or of a size such as "4G"."""
    size_bytes = parse_size(value, what) if isinstance(value, str) else int(value)
    if not 0 < size_bytes <= BYTES_MAX:
        raise FarmemError(f"{what} {value!r} is not a size", "write it as 4096, '512M' or '4G'")
    return size_bytes


def _inherited() -> "Budget | None":
    """The engine is loaded; the budget of the job that started this program, if one did."""
    global _engine, _current
    if _engine is None:
        engine = Engine()
        if engine.start_inherited():
            _current = Budget._of(engine)
        _engine = engine
    return _current


@dataclass(frozen=True, slots=True)
class BudgetStats:
    """What a Budget's stats() tells; bytes, and counts since the process joined its job."""

    budget_bytes: int  # the job's
    local_bytes: int  # of this process: pages that are here, and frames for those in motion
    remote_bytes: int  # only in the pool
    pinned_bytes: int
    counters: dict[str, int]  # the names of `farmem run --stats`


class Budget:
    """How much of this process's regions may be local, and where the rest goes.

    A process has one budget, for all its regions; it lives as long as the process.

    >>> import farmem
    >>> budget = farmem.Budget("32M", pool="mem:1G")
    >>> first = farmem.Region("64M", budget=budget)
    >>> second = farmem.Region("64M", budget=budget)
    >>> budget.local_bytes = "48M"
    >>> budget.local_bytes == 48 << 20
    True
    >>> farmem.Budget.current() is budget
    True

    `local` is a number of bytes or a size such as "4G", at least "16M"; `pool` and `filters`
    are those of `farmem run`, or lists of them.  Messages about lost pages and the like go to
    stderr; with `quiet=False` a summary at the end as well.  `no_pinned_io=True` vouches that
    nobody pins a region's memory (O_DIRECT, io_uring, RDMA), which kernels before 6.8 need to be
    told.  A pool on another host needs `tls_certificates="FOLDER"`, or `tls="off"`, as for
    `farmem run`; for `rdma:` pools `rdma_device` and `rdma_gid_index` are its options as well.

    In a program that was started by `farmem run` the budget is the job's: `Budget.current()`.
    """

    def __init__(  # noqa: PLR0913 - the options of `farmem run`, each by its name
        self,
        local: int | str,
        *,
        pool: str | Sequence[str] = "mem:",
        filters: Sequence[str] = (),
        quiet: bool = True,
        no_pinned_io: bool = False,
        tls: str = "",
        tls_certificates: str = "",
        rdma_device: str = "",
        rdma_gid_index: int | None = None,
    ) -> None:
        from farmem.regionjob import start_job

        global _current
        pools = [pool] if isinstance(pool, str) else list(pool)
        wanted = {
            "budget_bytes": size_of(local, "local memory"),
            "pools": pools,
            "filters": [filters] if isinstance(filters, str) else list(filters),
            "quiet": quiet,
            "no_pinned_io": no_pinned_io,
            "tls": tls,
            "tls_certificates": tls_certificates,
            "rdma_device": rdma_device,
            "rdma_gid_index": rdma_gid_index,
        }
        with _lock:
            there = _inherited()
            if there is not None:
                raise there._refusal()
            assert _engine is not None
            if not _engine.start(start_job(wanted)):
                raise FarmemError(
                    "the engine could not join the supervisor that was started for it",
                    "see what it said on stderr; `ulimit -v` must leave room for the pool",
                )
            self.engine = _engine
            self._pool = " ".join(pools)
            _current = self

    @classmethod
    def _of(cls, engine: Engine) -> Self:
        """The budget of the job that started this program."""
        self = cls.__new__(cls)
        self.engine = engine
        self._pool = ""
        return self

    def _refusal(self) -> FarmemError:
        """Why there can't be another budget."""
        if self.is_jobs:
            return FarmemError(
                "this program runs under `farmem run`, which has set its budget and its pool",
                "leave local=, pool= and filters= out: farmem.Region(size)",
            )
        return FarmemError(
            f"this process has a budget already: {format_bytes(self.local_bytes)}",
            "use it: farmem.Region(size); or change it: region.local_bytes = '4G'",
        )

    @classmethod
    def current(cls) -> "Budget | None":
        """The budget of this process; None: it has none yet."""
        with _lock:
            return _inherited()

    @property
    def is_jobs(self) -> bool:
        """Whether it is that of a `farmem run` job, and all of the program counts."""
        return not self._pool

    @property
    def user_mode_only(self) -> bool:
        """Whether system calls on missing pages fail with EFAULT.

        So it is without privilege.  Then pin() what a system call is to read or write.
        """
        return bool(self.engine.control.userfaultfd_way == lib.FM_UFFD_USER_MODE)

    @property
    def local_bytes(self) -> int:
        """How much may be local; a new value counts from when it is set, up or down."""
        return int(self.engine.control.budget_bytes)

    @local_bytes.setter
    def local_bytes(self, value: int | str) -> None:
        size_bytes = size_of(value, "local memory")
        checks.check_budget(size_bytes, "region.local_bytes = '16M'")
        if self.is_jobs:
            raise FarmemError(
                "this program runs under `farmem run`: the budget is its job's",
                f"change it from outside: farmem set {os.getpid()} local=4G",
            )
        pinned_bytes = self.engine.call(lib.FM_REGION_LOOK).pinned_bytes
        if pinned_bytes + lib.FM_REGION_HEAD_ROOM_BYTES > size_bytes:
            raise FarmemError(
                f"a budget of {format_bytes(size_bytes)} can't hold the "
                f"{format_bytes(pinned_bytes)} that are pinned",
                "unpin some first: region.unpin()",
            )
        self.engine.call(lib.FM_REGION_BUDGET, value=size_bytes)

    def stats(self) -> BudgetStats:
        """Where the memory of this process's regions is, and what has been done so far.

        >>> import farmem
        >>> budget = farmem.Budget("16M")
        >>> region = farmem.Region("64M", budget=budget)
        >>> region.view()[:] = bytes(range(256)) * (len(region) // 256)
        >>> stats = budget.stats()
        >>> stats.local_bytes <= stats.budget_bytes == 16 << 20
        True
        >>> stats.counters["pages_evicted"] > 0
        True
        """
        now = self.engine.call(lib.FM_REGION_LOOK)
        return BudgetStats(
            budget_bytes=self.local_bytes,
            local_bytes=now.local_bytes,
            remote_bytes=now.remote_bytes,
            pinned_bytes=now.pinned_bytes,
            counters=self.engine.counters(),
        )

    def __repr__(self) -> str:
        whose = "of the farmem job" if self.is_jobs else f"pool {self._pool!r}"
        return f"<farmem.Budget {format_bytes(self.local_bytes)}, {whose}>"


def budget_for(
    budget: Budget | None,
    local: int | str | None,
    pool: str | Sequence[str] | None,
    filters: Sequence[str],
) -> Budget:
    """The budget of a region that was asked for with these words."""
    if budget is not None:
        if local is not None or pool is not None or filters:
            raise FarmemError(
                "budget= says already how much may be local, and where the rest goes",
                "leave local=, pool= and filters= out",
            )
        return budget
    if local is not None:
        return Budget(local, pool="mem:" if pool is None else pool, filters=filters)
    current = Budget.current()
    if current is None:
        raise FarmemError(
            "nothing says how much of the region may be local",
            "say it with the first one: farmem.Region(size, local='4G')",
        )
    if pool is not None or filters:
        raise current._refusal()
    return current
