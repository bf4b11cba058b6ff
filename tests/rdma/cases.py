"""What the cases of batch.py share: how one is made, and how the work of a server is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.pools.serving import Server
from tests.rdma.client import Status

REQUIRED = ("--rdma", "require")
CASES: dict[str, Callable[..., dict[str, Any] | None]] = {}


def case(run: Callable[..., dict[str, Any] | None]) -> Callable[..., dict[str, Any] | None]:
    assert run.__name__ not in CASES
    CASES[run.__name__] = run
    return run


def fails_with(request: Callable[[], object]) -> int:
    """The status of a request that must not succeed."""
    try:
        request()
    except Status as found:
        return found.status
    raise AssertionError("a request that must fail was carried out")


def switches_of(pids: list[int]) -> int:
    """How often the processes' threads were given a processor."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for line in (task / "status").read_text().splitlines():
                if "ctxt_switches" in line:
                    total += int(line.split()[1])
    return total


def cpu_ticks_of(pids: list[int]) -> int:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(words[11]) + int(words[12]) for words in fields)


def counter(name: str) -> int:
    return int(Path(f"/sys/class/infiniband/rxe0/ports/1/hw_counters/{name}").read_text())


def work_of(server: Server) -> dict[str, int]:
    """So far: what its processes did, and what came to the device."""
    pids = [server.process.pid, server.nbdkit()]
    return {
        "switches": switches_of(pids),
        "cpu_ticks": cpu_ticks_of(pids),
        "packets": counter("rcvd_pkts"),
    }


def work_in(server: Server, do: Callable[[], object]) -> dict[str, int]:
    """The same of the time in which something is done."""
    before = work_of(server)
    do()
    return {name: number - before[name] for name, number in work_of(server).items()}
