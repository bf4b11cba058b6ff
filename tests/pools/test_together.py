"""`farmem run` on a real `farmem serve`, each as users start it: right bytes, whatever happens.

Over TCP and a Unix socket, between processes that fork, that are killed, that share a server; and
with the server killed, stopped, started anew and drained under them.  Every program here checks
every word that it meets.  What the two sides do by themselves is tested in test_nbd_*.py and
test_serve_*.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    Job,
    Result,
    assert_ok,
    assert_paged,
    compile_c,
    run_farmem,
    run_plain,
)
from tests.pools import jobs
from tests.pools.serving import MIB, TCP, UNIX, Server, serving, until

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
LIMIT_S = 90
CAPACITY = 512 * MIB


def url_of(server: Server, way: str, size: str = "") -> str:
    where = f"tcp://127.0.0.1:{server.port}" if way == TCP else f"unix://{server.path}"
    return f"{where}?size={size}" if size else where


def options_of(server: Server, way: str = TCP, size: str = "") -> tuple[str, ...]:
    return ("--pool", url_of(server, way, size))


@contextlib.contextmanager
def lending(*options: str, **more: str) -> Iterator[Server]:
    """A server that must have all of its memory back at the end, if it still runs."""
    with serving(*options, capacity=str(CAPACITY), **more) as server:
        yield server
        if server.process.poll() is None:
            all_is_back(server)


def all_is_back(server: Server) -> None:
    until(lambda: server.about()["free_bytes"] == CAPACITY, "the memory")
    metrics = server.metrics()
    assert metrics["leases"] == 0 and metrics["used_bytes"] == 0, metrics


def endless(
    server: Server, folder: Path, *options: str, way: str = TCP
) -> contextlib.AbstractContextManager[Job]:
    return jobs.endless(folder, (*options_of(server, way, "256M"), *options))


def stop(job: Job, folder: Path) -> Result:
    result = jobs.stop(job, folder)
    assert result.stats is not None and result.stats["pages_lost"] == 0, result.describe()
    return result


def assert_lost(result: Result, server: Server) -> None:
    """Ended by SIGBUS, and told which server took the pages with it."""
    assert result.returncode == -signal.SIGBUS, result.describe()
    assert f"127.0.0.1:{server.port}".encode() in result.stderr, result.describe()
    assert b"lost" in result.stderr and b"bytes" in result.stderr, result.describe()


# ---- nothing goes wrong


@pytest.mark.parametrize("way", [TCP, UNIX])
def test_every_word(way: str) -> None:
    with lending() as server:
        result = run_farmem(
            [compile_c("verify"), "4", "96", "2"], local="24M", options=options_of(server, way)
        )
        assert_ok(result)
        assert_paged(result.stats, 10_000, 10_000)
        assert result.stats is not None
        for nothing in ("pages_lost", "fetch_retries", "store_errors", "pool_connections_lost"):
            assert result.stats[nothing] == 0, nothing
        moved = server.metrics()
        assert moved['data_bytes_total{kind="read"}'] >= 4096 * result.stats["pages_fetched"]
        assert moved['data_bytes_total{kind="write"}'] >= 4096 * result.stats["pages_stored"]


@pytest.mark.parametrize("way", [TCP, UNIX])
def test_a_real_program_at_a_quarter(way: str, tmp_path: Path) -> None:
    """sort, with a quarter of what it needs here."""
    lines = tmp_path / "lines"
    text = "".join(f"{k * 2654435761 % 1_000_003:07d} {'line ' * 30}{k}\n" for k in range(500_000))
    lines.write_text(text)
    command = ["sort", "--parallel=1", "-S", "200M", str(lines)]
    plain = run_plain(command, env={**os.environ, "LC_ALL": "C"})
    local = plain.peak_rss_bytes // 4
    with lending() as server:
        result = run_farmem(
            command, local=str(local), env={"LC_ALL": "C"}, options=options_of(server, way)
        )
    assert result.stdout == plain.stdout
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("mode", ["child", "double", "grand", "many", "malloc", "thread"])
def test_fork(mode: str) -> None:
    with lending() as server:
        result = run_farmem([compile_c("forks"), mode], local="32M", options=options_of(server))
        assert_ok(result)
        assert_paged(result.stats, 1000, 1000)


def test_two_jobs_on_one_server(tmp_path: Path) -> None:
    """Each has a lease of its own, and neither sees anything of the other."""
    other = tmp_path / "other"
    other.mkdir()
    with (
        lending() as server,
        endless(server, tmp_path) as one,
        endless(server, other, way=UNIX) as two,
    ):
        assert server.about()["leases"] == 2 and server.about()["free_bytes"] == 0
        stop(one, tmp_path)
        stop(two, other)


def test_a_server_that_is_full_refuses_the_job_and_not_a_page(tmp_path: Path) -> None:
    with lending() as server, endless(server, tmp_path) as job:
        refused = run_farmem(
            ["true"], local="32M", options=options_of(server, TCP, "300M"), check=False
        )
        assert refused.returncode == 125 and b"256.0 MiB free" in refused.stderr, refused.describe()
        stop(job, tmp_path)


def test_flipped_bits_are_read_again() -> None:
    with lending() as server:
        result = run_farmem(
            [compile_c("verify"), "2", "64", "8"],
            local="32M",
            # So seldom that hardly ever the second reading of the same page is struck too.
            filters=["error:corrupt=0.0003,seed=5", "checksum"],
            options=options_of(server),
        )
        assert_ok(result)
        assert result.stats is not None and result.stats["fetch_retries"] >= 1
        assert result.stats["pages_lost"] == 0


# ---- the server fails


def test_the_data_process_is_killed_again_and_again(tmp_path: Path) -> None:
    """What was acknowledged lies in the server's memory: nothing is lost."""
    with lending() as server, endless(server, tmp_path) as job:
        for number in range(1, 4):
            os.kill(server.nbdkit(), signal.SIGKILL)
            until(lambda n=number: server.metrics()["data_restarts_total"] == n, "its restart")
        result = stop(job, tmp_path)
        assert result.stats is not None and result.stats["pool_connections_lost"] >= 3


def test_a_server_that_is_killed(tmp_path: Path) -> None:
    with lending() as server, endless(server, tmp_path, "--pool-timeout", "2s") as job:
        server.end(signal.SIGKILL)
        assert_lost(job.finish(LIMIT_S), server)


def test_a_server_that_is_started_anew(tmp_path: Path) -> None:
    """At the same address, with as much memory, all zeros: the epoch is another."""
    with lending() as first, endless(first, tmp_path, "--pool-timeout", "60s") as job:
        port = first.port
        first.end(signal.SIGKILL)
        with serving(capacity=str(CAPACITY), listens=[f"127.0.0.1:{port}"]) as second:
            assert_lost(job.finish(LIMIT_S), first)
            assert second.about()["free_bytes"] == CAPACITY


def test_a_server_that_stands_still_for_ten_seconds(tmp_path: Path) -> None:
    """All of it: the program waits, is told, and goes on; its lease lives on."""
    with lending("--ttl", "2s") as server, endless(server, tmp_path) as job:
        stopped = [server.nbdkit(), server.process.pid]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(10)
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)
        job.await_err("answers again")
        result = stop(job, tmp_path)
        assert b"does not answer" in result.stderr
        assert result.stats is not None and result.stats["pool_silent_ns"] > 8_000_000_000


def test_a_drain_lets_the_job_end(tmp_path: Path) -> None:
    with (
        lending("--drain-timeout", "60s") as server,
        endless(server, tmp_path) as job,
    ):
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.about()["draining"], "the drain")
        refused = run_farmem(["true"], local="32M", options=options_of(server), check=False)
        assert refused.returncode == 125 and b"draining" in refused.stderr, refused.describe()
        stop(job, tmp_path)
        assert server.process.wait(LIMIT_S) == 0


# ---- the job fails


def test_a_killed_job_leaves_nothing(tmp_path: Path) -> None:
    """The program alone: its supervisor gives the lease back at once, long before its end."""
    with lending("--ttl", "3600s") as server, endless(server, tmp_path) as job:
        os.kill(job.process.pid, signal.SIGKILL)
        assert job.finish(LIMIT_S).returncode == -signal.SIGKILL
        all_is_back(server)


def test_a_job_that_is_killed_altogether_leaves_nothing(tmp_path: Path) -> None:
    """Nobody is left to give it back: its time runs out."""
    with lending("--ttl", "1s") as server, endless(server, tmp_path) as job:
        for pid in (job.supervisor(), job.process.pid):
            os.kill(pid, signal.SIGKILL)
        job.process.wait(LIMIT_S)
        all_is_back(server)
        assert server.metrics()['leases_ended_total{how="expired"}'] == 1
