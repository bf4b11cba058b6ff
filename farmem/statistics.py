"""What is left of a job when it has ended: the --stats file and the summary line."""

import json
import os
import time
from typing import Any

from farmem import __version__
from farmem.job import Job, Request
from farmem.sizes import format_bytes
from farmem.slots import Slots


def job_statistics(job: Job, slots: Slots, processes: int, adopted: int) -> dict[str, Any]:
    """Everything that is known of a job, names with units."""
    request: Request = job.request
    return {
        "version": __version__,
        "command": list(request.command),
        "budget_bytes": request.budget_bytes,
        "pool": request.pool.url,
        "filters": [item.text for item in request.filters],
        "wall_ns": time.monotonic_ns() - job.started_ns,
        "processes": processes,
        "processes_adopted": adopted,
        "pool_peak_bytes": slots.pool_peak_bytes(),
        # The command is not our child: its exit status is its parent's to know.
        "exit_known": False,
        **slots.totals(),
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
    return (
        f"farmem: {format_bytes(statistics['peak_local_bytes'])} peak local of "
        f"{format_bytes(statistics['budget_bytes'])} budget; "
        f"{statistics['pages_evicted']} pages evicted, {statistics['pages_fetched']} fetched "
        f"({statistics['pages_prefetched']} of them ahead of a fault), "
        f"{statistics['stall_ns'] / 1e9:.1f} s stalled"
    )
