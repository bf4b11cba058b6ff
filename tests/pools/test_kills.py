"""Real jobs on a real server, killed at random moments, again and again: no lease leaks.

FARMEM_TEST_KILLS=1000 kills that many instead of the few that a run of the tests has time for;
each kill and its moment come from a seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time

import pytest

from tests.harness import Job, compile_c, start_farmem
from tests.pools.serving import MIB, Server, serving, until

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
KILLS = int(os.environ.get("FARMEM_TEST_KILLS", "36"))
LANES = 3
# A job whose supervisor was killed too keeps its lease until its time is over: room for many.
CAPACITY = 4096 * MIB
LIMIT_S = 60
UNBORN = b"the supervisor could not be started"
# Which of them, and how the program may end then.
VICTIMS = {
    "program": {-signal.SIGKILL},
    "both": {-signal.SIGKILL},
    "data": {-signal.SIGKILL},
    # Nobody renews the lease any more: the program may meet its end before we end it.
    "supervisor": {-signal.SIGKILL, -signal.SIGBUS},
}


class Lane:
    """One job after the other, none of which lives for long."""

    def __init__(self, server: Server, seed: int, kills: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.kills = kills
        self.wrong: list[object] = []

    def run(self) -> None:
        try:
            for _ in range(self.kills):
                self.kill_one()
        except BaseException as error:
            self.wrong.append(error)
            raise

    def kill_one(self) -> None:
        victim = self.random.choice(list(VICTIMS))
        pool = f"tcp://127.0.0.1:{self.server.port}?size=128M"
        with start_farmem(
            [compile_c("verify"), "2", "64", "100000"], local="32M", options=("--pool", pool)
        ) as job:
            try:
                supervisor = job.supervisor(LIMIT_S)
            except AssertionError:
                self.wrong.append(("no supervisor", job.finish(0.1).describe()))
                return
            time.sleep(self.random.random() * 0.8)
            self.kill(victim, job, supervisor)
            result = job.finish(LIMIT_S, wait_stats_s=0)
        # Before it serves, the program has not begun.
        was_early = victim in ("supervisor", "both") and UNBORN in result.stderr
        ends = VICTIMS[victim] | ({125} if was_early else set())
        if result.returncode not in ends or b"WRONG" in result.stdout:
            self.wrong.append((victim, result.describe()))

    def kill(self, victim: str, job: Job, supervisor: int) -> None:
        if victim == "data":
            with contextlib.suppress(ProcessLookupError):  # another lane's kill
                os.kill(self.server.nbdkit(), signal.SIGKILL)
        if victim in ("supervisor", "both"):
            os.kill(supervisor, signal.SIGKILL)
        if victim in ("data", "supervisor"):
            time.sleep(self.random.random() * 0.4)
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.process.pid, signal.SIGKILL)


def test_random_kills_of_clients_leak_no_lease() -> None:
    compile_c("verify")
    with serving("--ttl", "4s", capacity=str(CAPACITY)) as server:
        lanes = [Lane(server, seed, KILLS // LANES) for seed in range(LANES)]
        threads = [threading.Thread(target=lane.run) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [lane.wrong for lane in lanes] == [[]] * LANES
        until(lambda: server.about()["free_bytes"] == CAPACITY, "the memory")
        metrics = server.metrics()
        assert metrics["leases"] == 0 and metrics["used_bytes"] == 0, metrics
        ended = sum(value for name, value in metrics.items() if name.startswith("leases_ended"))
        assert metrics["leases_granted_total"] == ended == KILLS // LANES * LANES, metrics


def test_a_server_that_is_killed_again_and_again() -> None:
    """Each time a job is under way: it ends by SIGBUS, with no wrong byte."""
    seeded = random.Random(7)
    for _ in range(max(2, KILLS // 12)):
        with (
            serving(capacity=str(CAPACITY)) as server,
            start_farmem(
                [compile_c("verify"), "2", "64", "100000"],
                local="32M",
                options=("--pool", f"tcp://127.0.0.1:{server.port}", "--pool-timeout", "1s"),
            ) as job,
        ):
            until(lambda server=server: server.metrics()['data_requests_total{kind="read"}'] > 0,
                  "pages that come back")  # fmt: skip
            time.sleep(seeded.random() * 0.5)
            server.end(signal.SIGKILL)
            result = job.finish(LIMIT_S)
            assert result.returncode == -signal.SIGBUS, result.describe()
            assert b"WRONG" not in result.stdout
