"""When a pool on servers gets more memory, and when it gives some back.

What is evicted is only stored in what was leased before, so more is leased while there is still
some free.  Amounts grow with what is there already, so that few leases do; and what is given back
is so much less than what would be got again that it does not go to and fro.
"""

EXTENT_BYTES = 2 << 20
FIRST_BYTES_MIN = 64 << 20
_LOW_BYTES_MIN = 32 << 20
_CHUNK_BYTES_MIN = 64 << 20
# Each lease has a place of its own, for good.  When there are few left they are for growing alone,
# and what is taken then is more.
PLACES_FEW = 8


def whole_extents(size_bytes: int) -> int:
    """As many as fit, at least one."""
    return max(size_bytes // EXTENT_BYTES, 1) * EXTENT_BYTES


def first_bytes(budget_bytes: int, servers: int) -> int:
    """What to lease of each server at the start."""
    return whole_extents(max(budget_bytes, FIRST_BYTES_MIN) // servers)


def _low_bytes(leased_bytes: int) -> int:
    return max(leased_bytes // 4, _LOW_BYTES_MIN)


def wanted_bytes(free_bytes: int, leased_bytes: int, places: int) -> int:
    """How much more to lease now; 0: there is enough."""
    if free_bytes >= _low_bytes(leased_bytes):
        return 0
    share = 2 if places > PLACES_FEW else 1
    return whole_extents(max(leased_bytes // share, _CHUNK_BYTES_MIN))


def can_spare(free_bytes: int, leased_bytes: int, lease_bytes: int, places: int) -> bool:
    """Whether an unused lease can go: enough would be free without it."""
    left_bytes = leased_bytes - lease_bytes
    enough_bytes = 2 * _low_bytes(left_bytes)
    return places > PLACES_FEW and free_bytes - lease_bytes >= enough_bytes
