"""The server's books without a server: what is promised, what is waited for, where memory lies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farmem import _native
from farmem.pool import memory
from farmem.pool.leases import Leases, Quotas, Refused, Table
from farmem.pool.memory import Exhausted, Memory
from farmem.pools import EXTENT_BYTES

lib = _native.lib
MIB = 1 << 20
SECOND = 10**9


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with memory, whatever this one has."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 40)


@pytest.fixture
def books(plenty: None) -> Iterator[Leases]:
    yield books_with()


def books_with(capacity: int = 64 * MIB, defects: int = 0, space: int = 64 * MIB) -> Leases:
    found = Memory(False, space)
    return Leases(capacity, 10 * SECOND, Quotas(0, {}), found, Table(False, defects))


def reclaim(leases: Leases, seconds: float = 0.05) -> None:
    """Let the reclaimer work for a moment."""

    async def work() -> None:
        task = asyncio.ensure_future(leases.reclaim())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(work())


def is_lent_again_while_busy(defects: int) -> bool:
    """Whether memory of a lease that ended is lent again while an access is under way."""
    leases = books_with(8 * MIB, defects, 8 * MIB)
    first = leases.grant(8 * MIB, "", "", 0)
    row = leases.table.struct.leases[first.place]
    row.in_flight[1] = 1
    leases.end(first, "released")
    reclaim(leases)
    try:
        leases.grant(8 * MIB, "", "", 0)
    except Refused as refusal:
        assert refusal.status == 507 and leases.clearing_bytes == 8 * MIB
        row.in_flight[1] = 0
        leases._wake.set()
        reclaim(leases)
        leases.grant(8 * MIB, "", "", 0)
        return False
    return True


@pytest.mark.usefixtures("plenty")
def test_memory_is_not_lent_again_while_somebody_is_inside() -> None:
    assert not is_lent_again_while_busy(0)


@pytest.mark.usefixtures("plenty")
def test_memory_that_is_lent_too_soon_would_be_found() -> None:
    assert is_lent_again_while_busy(lib.FM_LEASE_DEFECT_NO_DRAIN)


def test_a_dead_door_holds_nothing(books: Leases) -> None:
    lease = books.grant(8 * MIB, "", "", 0)
    books.table.struct.leases[lease.place].in_flight[0] = 3
    books.end(lease, "expired")
    reclaim(books)
    assert books.clearing_bytes == 8 * MIB
    lib.fm_lease_door_gone(books.table.struct, 0)
    books._wake.set()
    reclaim(books)
    assert books.clearing_bytes == 0


def test_a_host_without_memory_promises_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is promised and not used yet counts: else every lease alone would look possible."""
    leases = books_with(1 << 40, space=1 << 50)
    left = memory.host_memory_bytes() // 32
    monkeypatch.setattr(memory, "available_bytes", lambda: left + 100 * MIB)
    leases.grant(60 * MIB, "", "", 0)
    assert leases.free_bytes == 40 * MIB
    with pytest.raises(Refused) as refusal:
        leases.grant(42 * MIB, "", "", 0)
    assert refusal.value.status == 507 and "this host can back only 40.0 MiB" in refusal.value.what
    assert f"at most {40 * MIB} bytes" in refusal.value.hint
    leases.grant(40 * MIB, "", "", 0)
    assert leases.free_bytes == 0


def test_a_control_groups_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    folder = str(tmp_path)
    for name, text in (("max", "104857600"), ("current", "20971520"), ("stat", "inactive_file 7")):
        with open(f"{folder}/memory.{name}", "w", encoding="ascii") as file:
            file.write(f"{text}\n")
    assert memory.available_bytes() > 0
    monkeypatch.setattr(memory, "_cgroups", lambda: iter([folder, "/nosuch"]))
    assert memory.available_bytes() == 80 * MIB + 7
    with open(f"{folder}/memory.max", "w", encoding="ascii") as file:
        file.write("max\n")
    assert memory.available_bytes() > 80 * MIB


def test_late_looks_cost_nobody_a_lease(books: Leases) -> None:
    """Time in which this process did not run is not counted; time in which it did, is."""
    lease = books.grant(MIB, "", "", 0)
    for second in range(9):
        assert books.expire(second * SECOND) == []
    assert books.expire(100 * SECOND) == []  # 91 s late: it has one second left
    assert books.expire(101 * SECOND) == [lease]
    assert books.ended == {"released": 0, "expired": 1}


def test_the_table_is_finite(books: Leases) -> None:
    leases = books_with(1 << 40, space=1 << 50)
    for _ in range(lib.FM_LEASES_MAX):
        leases.grant(1, "", "", 0)
    with pytest.raises(Refused) as refusal:
        leases.grant(1, "", "", 0)
    assert refusal.value.status == 507
    assert leases.memory.taken_bytes == lib.FM_LEASES_MAX * EXTENT_BYTES


SPACE_EXTENTS = 16
STEPS = st.lists(st.tuples(st.booleans(), st.integers(1, SPACE_EXTENTS)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_ranges_never_overlap(steps: list[tuple[bool, int]]) -> None:
    """Whatever is taken and given back: ranges are apart, inside, and found if one fits."""
    found = Memory(True, SPACE_EXTENTS * EXTENT_BYTES)  # huge pages: the host is not asked ...
    found._reserve = lambda offset, size: None  # type: ignore[method-assign]  # ... nor the kernel
    taken: list[tuple[int, int]] = []
    for takes, number in steps:
        if not takes and taken:
            found.give_back(*taken.pop(number % len(taken)))
            continue
        size = number * EXTENT_BYTES
        free = set(range(SPACE_EXTENTS)) - {
            at // EXTENT_BYTES + i for at, length in taken for i in range(length // EXTENT_BYTES)
        }
        fits = any(free.issuperset(range(i, i + number)) for i in range(SPACE_EXTENTS - number + 1))
        try:
            offset = found.take(size)
        except Exhausted:
            assert not fits
            continue
        places = range(offset // EXTENT_BYTES, (offset + size) // EXTENT_BYTES)
        assert free.issuperset(places)
        taken.append((offset, size))
        assert found.taken_bytes == sum(length for _, length in taken)
