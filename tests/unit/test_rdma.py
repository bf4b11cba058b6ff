"""The server's RDMA without a device: what is chosen, what is refused, and in which order memory
is taken away from the device before it is lent again.

pyverbs is played by tests/rdma/fake; real verbs are in tests/rdma/test_soft_roce.py.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import resource
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from farmem import _native
from farmem.errors import FarmemError
from farmem.pool import memory, queuepairs, rdma
from farmem.pool.leases import Lease, Leases, Quotas, Refused, Table
from farmem.pool.memory import Memory
from farmem.pool.queuepairs import QueuePairs, check_wanted, half_in, open_queue_pairs
from farmem.pool.rdma import ETHERNET, INFINIBAND, Gid, choose_gid

lib = _native.lib
MIB = 1 << 20
FAKE = Path(__file__).resolve().parents[1] / "rdma" / "fake"
THEIRS = {
    "qpn": 17, "psn": 4711, "gid": "::ffff:10.0.0.7", "lid": 0, "mtu": 1024, "link": "ethernet",
}  # fmt: skip
V4 = "0000:0000:0000:0000:0000:ffff:0a00:0007"
V4_OTHER = "0000:0000:0000:0000:0000:ffff:0a00:0008"
V6 = "2001:0db8:0000:0000:0000:0000:0000:0001"
LOCAL = "fe80:0000:0000:0000:0000:0000:0000:0001"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A host with memory and a device."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 40)
    monkeypatch.syspath_prepend(str(FAKE))
    yield importlib.import_module("pyverbs").world
    for name in [name for name in sys.modules if name.split(".")[0] == "pyverbs"]:
        del sys.modules[name]


def books_with(defects: int = 0) -> Leases:
    space = Memory(False, 64 * MIB)
    return Leases(64 * MIB, 10**10, Quotas(0, {}), space, Table(False, defects))


def pairs_of(leases: Leases) -> QueuePairs:
    found = open_queue_pairs(check_wanted("require", "", None), leases)
    assert found is not None
    return found


def run(work: Callable[[QueuePairs, Lease], Coroutine[Any, Any, Any]], defects: int = 0) -> Any:
    """Do something with a lease of a server, while it reclaims what has ended."""
    leases = books_with(defects)
    pairs = pairs_of(leases)

    async def play() -> Any:
        lease = leases.grant(4 * MIB, "", "", 0)
        task = asyncio.ensure_future(leases.reclaim())
        try:
            async with asyncio.timeout(20):  # only to end a hang
                return await work(pairs, lease)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return asyncio.run(play())


async def connect(pairs: QueuePairs, lease: Lease, **other: Any) -> dict[str, Any]:
    return await pairs.connect(lease.id, lease.token, {**THEIRS, **other})


async def ended(pairs: QueuePairs, lease: Lease) -> None:
    pairs._leases.end(lease, "released")
    while pairs._leases.clearing_bytes:
        await asyncio.sleep(0)


# ---- what is chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gids", "link", "index"),
    [
        ([(0, LOCAL, 2), (1, V4, 2)], ETHERNET, 1),
        ([(0, LOCAL, 1), (1, LOCAL, 2), (2, V4, 1), (3, V4, 2)], ETHERNET, 3),
        ([(0, LOCAL, 2), (1, V6, 2)], ETHERNET, 1),
        ([(0, V6, 2), (4, V4, 2), (5, V4_OTHER, 2)], ETHERNET, 4),
        ([(2, V4, 1), (7, LOCAL, 2)], ETHERNET, 7),
        ([(0, LOCAL, 0), (1, V6, 0)], INFINIBAND, 0),
    ],
)
def test_the_gid_that_most_peers_can_reach(
    gids: list[tuple[int, str, int]], link: str, index: int
) -> None:
    assert choose_gid([Gid(*gid) for gid in gids], link, None).index == index


def test_a_gid_that_was_asked_for() -> None:
    gids = [Gid(0, LOCAL, 2), Gid(3, V4, 2)]
    assert choose_gid(gids, ETHERNET, 0).index == 0
    with pytest.raises(FarmemError) as error:
        choose_gid(gids, ETHERNET, 1)
    assert "--rdma-gid-index 1" in error.value.what
    assert "3 (::ffff:10.0.0.7, RoCE v2)" in error.value.hint
    with pytest.raises(FarmemError) as error:
        choose_gid([], ETHERNET, None)
    assert "ip address add" in error.value.hint


def test_the_first_device_with_a_port_that_is_up(world: Any) -> None:
    world.devices = ["fake0", "fake1"]
    adapter = rdma.open_adapter("", None)
    assert (adapter.name, adapter.port, adapter.gid.index, adapter.mtu) == ("fake0", 1, 2, 4096)
    assert rdma.open_adapter("fake1", None).name == "fake1"
    with pytest.raises(FarmemError) as error:
        rdma.open_adapter("mlx5_0", None)
    assert "mlx5_0" in error.value.what and "fake0, fake1" in error.value.hint
    world.ports[0].state = 1
    with pytest.raises(FarmemError) as error:
        rdma.open_adapter("", None)
    assert "no port of fake0, fake1 is active" in error.value.what


def test_importing_pyverbs_leaves_the_log_as_it_was(world: Any) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    rdma._load()
    assert (root.handlers, root.level) == before


# ---- whether there is RDMA -----------------------------------------------------------------------


def why_not(capsys: pytest.CaptureFixture[str], mode: str) -> str:
    """What is said where there is none: in an error, in a warning, or not at all."""
    try:
        assert open_queue_pairs(check_wanted(mode, "", None), books_with()) is None
    except FarmemError as error:
        assert mode == "require"
        return str(error)
    return capsys.readouterr().err


def test_without_pyverbs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    assert "apt-get install python3-pyverbs" in why_not(capsys, "require")
    assert "warning: no RDMA: pyverbs" in why_not(capsys, "on")
    assert why_not(capsys, "") == why_not(capsys, "off") == ""


def test_without_a_device(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Only who asks for RDMA is told that there is none."""
    world.devices = []
    assert "no RDMA device" in why_not(capsys, "require")
    assert "warning: no RDMA: this host has no RDMA device" in why_not(capsys, "on")
    assert why_not(capsys, "") == why_not(capsys, "off") == ""


def test_without_permission(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    world.failing["open"] = 13
    for mode in ("require", "on", ""):
        said = why_not(capsys, mode)
        assert "fake0 can't be opened: Permission denied" in said
        assert "/dev/infiniband/uverbs" in said


def test_memory_that_may_not_be_locked(
    world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is lent must be what can be pinned; a privilege lifts the limit."""
    limit = 8 * MIB
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, limit))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)
    monkeypatch.setattr(queuepairs, "_may_lock_all", lambda: False)
    said = why_not(capsys, "require")
    assert "8.0 MiB of memory may be locked" in said and "needs 128.0 MiB" in said
    assert "LimitMEMLOCK=infinity" in said and "ulimit -l 131072" in said
    limit = 128 * MIB
    assert pairs_of(books_with())
    limit = 0
    monkeypatch.setattr(queuepairs, "_may_lock_all", lambda: True)
    assert pairs_of(books_with())


def test_words_that_do_not_go_together() -> None:
    assert check_wanted("", "mlx5_0", None).mode == check_wanted("", "", 0).mode == "require"
    assert check_wanted("on", "mlx5_0", None).mode == "on"
    with pytest.raises(FarmemError) as error:
        check_wanted("off", "", 3)
    assert "--rdma=off" in error.value.what


# ---- what is asked -------------------------------------------------------------------------------

BAD: list[dict[str, Any]] = [
    {"qpn": 1}, {"qpn": 1 << 24}, {"qpn": True}, {"qpn": "17"}, {"qpn": None}, {"psn": -1},
    {"psn": 1 << 24}, {"psn": 1.5}, {"gid": "::"}, {"gid": "10.0.0.7"}, {"gid": 7},
    {"gid": "::1%eth0"}, {"gid": "x" * 10000}, {"lid": -1}, {"lid": 1 << 16}, {"mtu": 1500},
    {"mtu": True}, {"mtu": [4096]}, {"link": "infiniband"}, {"link": "token ring"}, {"link": []},
]  # fmt: skip


@pytest.mark.parametrize("wrong", BAD, ids=lambda wrong: repr(wrong)[:30])
def test_a_half_that_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refusal:
        half_in({**THEIRS, **wrong}, ETHERNET)
    assert refusal.value.status == 400 and refusal.value.hint
    assert next(iter(wrong)) in refusal.value.what


def test_a_half_that_lacks_something() -> None:
    for key in THEIRS:
        with pytest.raises(Refused) as refusal:
            half_in({word: value for word, value in THEIRS.items() if word != key}, ETHERNET)
        assert key in refusal.value.what
    with pytest.raises(Refused) as refusal:
        half_in({**THEIRS, "link": "infiniband"}, INFINIBAND)
    assert "lid" in refusal.value.what


def test_what_is_answered(world: Any) -> None:
    async def work(pairs: QueuePairs, lease: Lease) -> None:
        first, second = await connect(pairs, lease), await connect(pairs, lease, mtu=4096)
        assert {**first, **dict.fromkeys(("queue_pair", "qpn", "psn", "rkey", "address"))} == {
            "queue_pair": None, "qpn": None, "psn": None, "rkey": None, "address": None,
            "gid": "::ffff:127.0.0.1", "lid": 0, "link": "ethernet", "mtu": 1024, "bytes": 4 * MIB,
            "retry_count": 6, "reads_in_flight": 16,
        }  # fmt: skip
        assert second["mtu"] == 4096
        for key in ("rkey", "address", "bytes"):
            assert first[key] == second[key]
        for key in ("queue_pair", "qpn", "psn"):
            assert first[key] != second[key]
        joined = world.queue_pairs[first["qpn"]].joined
        assert (joined.dest_qp_num, joined.rq_psn, joined.sq_psn) == (17, 4711, first["psn"])
        assert (pairs.count, pairs.registered_bytes) == (2, 4 * MIB)
        region = world.regions[first["rkey"]]
        assert (region.address, region.length) == (first["address"], 4 * MIB)
        pairs.disconnect(lease, first["queue_pair"])
        assert list(world.queue_pairs) == [second["qpn"]]
        with pytest.raises(Refused) as refusal:
            pairs.disconnect(lease, first["queue_pair"])
        assert refusal.value.status == 404

    run(work)


def test_whose_lease_it_is(world: Any) -> None:
    async def work(pairs: QueuePairs, lease: Lease) -> None:
        with pytest.raises(Refused) as refusal:
            await pairs.connect(lease.id, "0" * 64, THEIRS)
        assert refusal.value.status == 401
        with pytest.raises(Refused) as refusal:
            await pairs.connect("0" * 16, lease.token, THEIRS)
        assert refusal.value.status == 404
        assert "reg_mr" not in world.events

    run(work)


def test_there_are_only_so_many(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queuepairs, "PER_LEASE_MAX", 3)

    async def work(pairs: QueuePairs, lease: Lease) -> None:
        made = [await connect(pairs, lease) for _ in range(3)]
        with pytest.raises(Refused) as refusal:
            await connect(pairs, lease)
        assert refusal.value.status == 507
        pairs.disconnect(lease, made[0]["queue_pair"])
        await connect(pairs, lease)
        pairs.adapter.queue_pairs_max = 3
        other = pairs._leases.grant(4 * MIB, "", "", 0)
        with pytest.raises(Refused) as refusal:
            await connect(pairs, other)
        assert refusal.value.status == 507

    run(work)


@pytest.mark.parametrize(
    ("verb", "error", "status"),
    [("reg_mr", 12, 507), ("alloc_pd", 12, 507), ("create_qp", 12, 507), ("to_rts", 110, 400)],
)
def test_a_verb_that_fails(world: Any, verb: str, error: int, status: int) -> None:
    """It is told, nothing is left of it, and it may be tried again."""

    async def work(pairs: QueuePairs, lease: Lease) -> None:
        world.failing[verb] = error
        with pytest.raises(Refused) as refusal:
            await connect(pairs, lease)
        assert refusal.value.status == status and refusal.value.hint
        assert not world.queue_pairs and pairs.count == 0
        del world.failing[verb]
        await connect(pairs, lease)
        await ended(pairs, lease)
        assert not world.queue_pairs and not world.regions

    run(work)


def test_memory_that_can_not_be_mapped_or_brought(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    async def work(pairs: QueuePairs, lease: Lease) -> None:
        for place, name in ((queuepairs.mmap, "mmap"), (queuepairs.Registered, "populate")):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, refuse)
                with pytest.raises(Refused) as refusal:
                    await connect(pairs, lease)
            assert refusal.value.status == 507 and "can't be registered" in refusal.value.what
        await connect(pairs, lease)

    run(work)


# ---- the end of a lease --------------------------------------------------------------------------


def events_at_the_end(world: Any, defects: int) -> list[str]:
    """What happens to a lease with two queue pairs when it ends, in order."""

    async def work(pairs: QueuePairs, lease: Lease) -> list[str]:
        space = pairs._leases.memory
        clear, give_back = space.clear, space.give_back

        def noted_clear(offset: int, size_bytes: int) -> Iterator[None]:
            world.events.append("cleared")
            yield from clear(offset, size_bytes)

        def noted_give_back(offset: int, size_bytes: int) -> None:
            world.events.append("lent again")
            give_back(offset, size_bytes)

        space.clear, space.give_back = noted_clear, noted_give_back  # type: ignore[method-assign]
        await connect(pairs, lease)
        await connect(pairs, lease)
        world.events.clear()
        await ended(pairs, lease)
        return list(world.events)

    found: list[str] = run(work, defects)
    return found


def test_the_device_lets_go_before_memory_is_lent_again(world: Any) -> None:
    """Queue pairs to error and away, the registration away, then cleared, then lent again."""
    assert events_at_the_end(world, 0) == [
        "to_error", "destroy_qp", "to_error", "destroy_qp", "dereg_mr", "dealloc_pd",
        "cleared", "lent again",
    ]  # fmt: skip
    assert not world.regions


def test_a_registration_that_is_kept_would_be_found(world: Any) -> None:
    found = events_at_the_end(world, lib.FM_LEASE_DEFECT_KEEP_REGISTRATION)
    assert found == ["cleared", "lent again"]
    assert world.regions and world.queue_pairs


@pytest.mark.parametrize("verb", ["to_error", "destroy_qp", "dereg_mr", "dealloc_pd"])
def test_memory_that_the_device_keeps_is_never_lent_again(world: Any, verb: str) -> None:
    """Nobody knows what it can still reach: the server ends, and says why."""
    leases = books_with()
    pairs = pairs_of(leases)

    async def play() -> None:
        lease = leases.grant(4 * MIB, "", "", 0)
        await connect(pairs, lease)
        world.failing[verb] = 16
        leases.end(lease, "released")
        await leases.reclaim()

    with pytest.raises(FarmemError) as error:
        asyncio.run(play())
    assert "fake0 does not let go" in error.value.what and "busy" in error.value.what
    assert leases.memory.taken_bytes == 4 * MIB


def test_a_lease_that_ends_while_it_is_registered(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queuepairs, "PIECE_BYTES", 2 * MIB)

    async def work(pairs: QueuePairs, lease: Lease) -> None:
        asked = asyncio.ensure_future(connect(pairs, lease))
        await asyncio.sleep(0)
        pairs._leases.end(lease, "expired")
        with pytest.raises(Refused) as refusal:
            await asked
        assert refusal.value.status == 404
        while pairs._leases.clearing_bytes:
            await asyncio.sleep(0)
        assert "reg_mr" not in world.events
        assert pairs._leases.memory.used_bytes() == 0

    run(work)


def test_two_who_ask_at_once_share_a_registration(world: Any) -> None:
    async def work(pairs: QueuePairs, lease: Lease) -> None:
        first, second = await asyncio.gather(connect(pairs, lease), connect(pairs, lease))
        assert first["rkey"] == second["rkey"] and len(world.regions) == 1
        assert pairs._leases.memory.used_bytes() == 4 * MIB

    run(work)


def test_a_lease_that_is_busy_over_nbd(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is inside may be making a hole: registered before he has left, memory would be two."""
    monkeypatch.setattr(queuepairs, "_LEAVE_SECONDS", 0.01)

    async def work(pairs: QueuePairs, lease: Lease) -> None:
        row = pairs._leases.table.struct.leases[lease.place]
        row.in_flight[0] = 1
        with pytest.raises(Refused) as refusal:
            await connect(pairs, lease)
        assert refusal.value.status == 409 and not world.regions
        row.in_flight[0] = 0
        await connect(pairs, lease)
        assert row.pinned == 1

    run(work)


def test_a_server_that_stops_lets_go(world: Any) -> None:
    async def work(pairs: QueuePairs, lease: Lease) -> None:
        await connect(pairs, lease)
        pairs.close()
        assert not world.queue_pairs and not world.regions
        assert world.events[-1] == "close"

    run(work)
