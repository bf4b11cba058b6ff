"""When a pool on servers grows and shrinks: ahead of need, in few steps, and not to and fro."""

from hypothesis import given
from hypothesis import strategies as st

from farmem.growth import (
    EXTENT_BYTES,
    FIRST_BYTES_MIN,
    PLACES_FEW,
    can_spare,
    first_bytes,
    wanted_bytes,
)
from farmem.pools import SERVERS_MAX

MIB = 1 << 20
SIZES = st.integers(0, 1 << 44).map(lambda size: size // EXTENT_BYTES * EXTENT_BYTES)
PLACES = st.integers(0, SERVERS_MAX)


def test_the_first_lease_is_as_large_as_the_budget() -> None:
    assert first_bytes(16 * MIB, 1) == FIRST_BYTES_MIN == 64 * MIB
    assert first_bytes(1024 * MIB, 1) == 1024 * MIB
    assert first_bytes(1024 * MIB, 4) == 256 * MIB
    assert first_bytes(100 * MIB, 3) == 32 * MIB
    assert first_bytes(16 * MIB, 1000) == EXTENT_BYTES


def test_more_is_leased_before_it_is_needed() -> None:
    assert wanted_bytes(32 * MIB, 64 * MIB, 20) == 0
    assert wanted_bytes(30 * MIB, 64 * MIB, 20) == 64 * MIB
    assert wanted_bytes(255 * MIB, 1024 * MIB, 20) == 512 * MIB
    assert wanted_bytes(255 * MIB, 1024 * MIB, PLACES_FEW) == 1024 * MIB
    assert wanted_bytes(0, 0, 20) == 64 * MIB


def test_a_job_of_any_size_needs_few_leases() -> None:
    leased, places = first_bytes(16 * MIB, 1), SERVERS_MAX - 1
    while places > 0:
        leased += wanted_bytes(0, leased, places)
        places -= 1
    assert leased > 1 << 44


@given(SIZES, SIZES, SIZES, PLACES)
def test_what_is_given_back_is_not_got_again_at_once(
    free: int, leased: int, lease: int, places: int
) -> None:
    leased = max(leased, free)
    lease = min(lease, free)
    if can_spare(free, leased, lease, places):
        assert wanted_bytes(free - lease, leased - lease, places) == 0
        assert places > PLACES_FEW
        # and not when half of what is free then has been taken either
        assert wanted_bytes((free - lease + 1) // 2, leased - lease, places) == 0


@given(SIZES, SIZES, PLACES)
def test_amounts_are_whole_extents(free: int, leased: int, places: int) -> None:
    assert wanted_bytes(free, leased, places) % EXTENT_BYTES == 0
    assert first_bytes(leased, 3) % EXTENT_BYTES == 0
