"""Cases of batch.py: `farmem run --pool rdma://...` on real verbs, against a `farmem serve`.

Linux 6.1 has no UFFDIO_MOVE, so pages leave by being copied; how they come is the same everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import harness
from tests.guest.cases import LOCAL, VOUCHED, Case
from tests.pools.serving import Server, until
from tests.rdma import programs
from tests.rdma.cases import case, work_in

CAPACITY = "128M"
LIMIT_S = 400
PAGE_BYTES = 4096


def farmem_run(command: Sequence[str | Path], host: str, port: int) -> harness.Result:
    """To its end.  A server that does not answer within five seconds is an error; in a guest on a
    busy host that is no time at all, so it is asked again."""
    pool = f"rdma://{host}:{port}?size=80M"
    options = (*VOUCHED, "--pool", pool, "--tls", "off", "--pool-timeout", "60s")

    def run() -> harness.Result | None:
        result = harness.run_farmem(
            command, local=LOCAL, options=options, timeout=LIMIT_S, check=False
        )
        is_slow = result.returncode == 125 and b"does not answer" in result.stderr
        return None if is_slow else result

    result = until(run, "the server", LIMIT_S)
    assert isinstance(result, harness.Result)
    assert result.returncode == 0 and result.stats is not None, result.describe()
    assert result.stats["pages_lost"] == 0, result.stats
    return result


def run(program: Case, host: str, port: int) -> dict[str, Any]:
    """A program that checks its own bytes."""
    result = farmem_run([program.program(), *program.command.split()[1:]], host, port)
    harness.assert_ok(result)
    harness.assert_paged(result.stats, 1000, 500)
    assert result.stats is not None
    return result.stats


def assert_one_sided(work: dict[str, int], stats: dict[str, Any]) -> None:
    """Of a server: its device got the pages, each a packet at least, and its processes slept."""
    assert work["packets"] >= stats["pages_stored"] >= 1000, (work, stats)
    assert work["switches"] < (stats["pages_stored"] + stats["pages_fetched"]) // 10, (work, stats)


@case
def forked_children(server: Server) -> None:
    """Each with a queue pair of its own."""
    assert run(programs.FORKS, "127.0.0.1", server.port)["forks"] >= 1


@case
def sed_at_a_quarter(server: Server) -> dict[str, Any]:
    """A real program, with a quarter of its memory."""
    found: list[harness.Result] = []

    def run_sed() -> None:
        found.append(farmem_run(programs.SED, "127.0.0.1", server.port))

    def requests() -> list[float]:
        metrics = server.metrics()
        return [metrics[f'data_requests_total{{kind="{kind}"}}'] for kind in ("read", "write")]

    before = requests()
    work = work_in(server, run_sed)
    stats = found[0].stats
    assert stats is not None and requests() == before
    half_pages = programs.LINES * programs.LINE_BYTES // PAGE_BYTES // 2
    harness.assert_paged(stats, half_pages, half_pages)
    assert stats["pages_copied_out"] == stats["pages_evicted"], stats
    assert_one_sided(work, stats)
    digest = hashlib.sha256(found[0].stdout).hexdigest()
    return {"digest": digest, "work": work, "stats": stats}
