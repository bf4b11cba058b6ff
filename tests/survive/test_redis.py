"""Redis as people run it: daemonized, saving in the background while it is being used.

This is the hardest of the programs: it forks to become a daemon and its parent goes, its memory is
jemalloc's, and BGSAVE forks a second time, when most of its pages are out, so that the child must
read what its parent had evicted.  The clients run outside the job.  Every known key is read back
from the server, and from a plain server that loads the file that BGSAVE wrote.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import assert_paged, start_farmem
from tests.survive.budget import within_budget
from tests.survive.redis_server import RedisPlain, Server, exercise

pytestmark = [pytest.mark.survive, pytest.mark.uffd, pytest.mark.move]

PAGE_BYTES = 4096


@pytest.mark.parametrize(("percent", "evict"), [(50, None), (25, None), (50, "copy")])
def test_redis_saves_while_it_serves(
    plain_redis: RedisPlain, short_folder: Path, percent: int, evict: str | None
) -> None:
    budget = plain_redis.budget_bytes(percent)
    server = Server(short_folder)
    with start_farmem(server.command(), local=str(budget), evict=evict, sampled=True) as job:
        try:
            assert job.process.wait(60) == 0, server.log()
            server.wait_ready()
            assert job.sampler is not None
            job.sampler.add(server.pid())
            exercise(server)
            assert "farmem" in Path(f"/proc/{server.pid()}/maps").read_text(), "not under farmem"
            server.shutdown()
        finally:
            server.kill()
        result = job.finish()
    server.check_rdb()
    assert result.stats is not None, result.describe()
    assert_paged(result.stats, (plain_redis.peak_bytes - budget) // PAGE_BYTES // 2, 256)
    assert result.stats["pages_lost"] == 0, result.stats
    assert result.stats["forks"] >= 1, "BGSAVE forks"
    assert within_budget(result, plain_redis.peak_bytes) or evict == "copy", result.describe()
    way = "pages_copied_out" if evict == "copy" else "pages_moved_out"
    assert result.stats[way] > 0, result.stats
