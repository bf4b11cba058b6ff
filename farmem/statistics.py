"""What is known of a job: while it runs (`farmem stat`), and what is left of it when it has
ended (the --stats file and the summary line).  The same name means the same thing in both."""

import json
import os
import time
from typing import Any, NamedTuple

from farmem import __version__
from farmem.budget import Budget
from farmem.job import Job, Request
from farmem.sizes import format_bytes
from farmem.slots import Slots


class Joined(NamedTuple):
    """How many processes have ever been of a job, and of how many memory was short."""

    processes: int
    adopted: int


def _statistics(job: Job, slots: Slots, budget: Budget, joined: Joined) -> dict[str, Any]:
    request: Request = job.request
    return {
        "version": __version__,
        "command": list(request.command),
        **budget.statistics(),
        "pool": request.pool.url,
        "pool_capacity_bytes": slots.pool_capacity_bytes(),
        "pool_direct_io": job.pool.is_direct,
        "filters": [item.text for item in request.filters],
        "wall_ns": time.monotonic_ns() - job.started_ns,
        "processes": joined.processes,
        "processes_adopted": joined.adopted,
        "pool_peak_bytes": slots.pool_peak_bytes(),
        **slots.totals(),
    }


def job_statistics(job: Job, slots: Slots, budget: Budget, joined: Joined) -> dict[str, Any]:
    """Everything that is known of a job that has ended, names with units."""
    # The command is not our child: its exit status is its parent's to know.
    return {**_statistics(job, slots, budget, joined), "exit_known": False}


def job_status(job: Job, slots: Slots, budget: Budget, joined: Joined) -> dict[str, Any]:
    """How a job stands: what has been counted so far, and what is now."""
    slots.sample()
    members = slots.members()
    now = ("local_bytes", "remote_bytes", "managed_bytes", "engine_bytes")
    statistics = _statistics(job, slots, budget, joined)
    return {
        **statistics,
        "faults": sum(statistics[name] for name in slots.fault_names),
        "pool_stored_bytes": slots.pool_stored_bytes(),
        **{name: sum(member[name] for member in members) for name in now},
        "members": members,
    }


def write_statistics(path: str, statistics: dict[str, Any]) -> None:
    """Replace the file at once: a reader sees nothing, the old one or the whole new one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            json.dump(statistics, file, indent=2)
            file.write("\n")
        os.rename(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def summary(statistics: dict[str, Any]) -> str:
    """One line for a person; empty when nothing was paged."""
    if statistics["pages_evicted"] == 0:
        return ""
    budget = f"{format_bytes(statistics['budget_bytes'])} budget"
    if statistics["budget_changes"]:
        most = format_bytes(statistics["budget_peak_bytes"])
        budget = f"{most} budget at most (changed while it ran, {budget} at the end)"
    return (
        f"farmem: {format_bytes(statistics['peak_local_bytes'])} peak local of {budget}; "
        f"{statistics['pages_evicted']} pages evicted, {statistics['pages_fetched']} fetched "
        f"({statistics['pages_prefetched']} of them ahead of a fault), "
        f"{statistics['stall_ns'] / 1e9:.1f} s stalled"
    )
