"""Rates of a running job: what two of its statuses tell together."""

from typing import Any

# Names as in --stats: how much they have grown, per second.
_COUNTERS = ("faults", "pages_fetched", "pages_evicted", "bytes_in", "bytes_out")
_NS_PER_SECOND = 1_000_000_000


def rates_between(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, float] | None:
    """Counts per second between two statuses of one job; None: they are of one moment.

    stalled_share: how long faults waited, of the time that has passed.  It sums up all
    threads: two that wait all the time are 2.0.
    """
    interval_ns = later["wall_ns"] - earlier["wall_ns"]
    if interval_ns <= 0:
        return None
    per_second = {
        f"{name}_per_second": round((later[name] - earlier[name]) * _NS_PER_SECOND / interval_ns, 1)
        for name in _COUNTERS
    }
    stalled_share = round((later["stall_ns"] - earlier["stall_ns"]) / interval_ns, 4)
    return {"interval_ns": interval_ns, **per_second, "stalled_share": stalled_share}
