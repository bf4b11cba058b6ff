"""Several servers by RDMA, and RDMA beside others: every byte is right, leases come and go, and one
that dies takes its own pages with it and nothing else.

Servers and device are fakes (fake_fabric.py): each lease is a part of one memory with a key of its
own, and a server can fall silent alone.  Agent, engine and supervisor are the real ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import assert_ok, assert_paged, compile_c, run_farmem, start_farmem
from tests.pools.fake_fabric import FakeRdmaServe, fake_rdmas
from tests.pools.jobs import assert_some_lost, options_of
from tests.pools.nbd_servers import nbd_server
from tests.pools.serving import MIB, serving, until

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
LIMIT_S = 90
SOON = ("--pool-timeout", "2s")


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeRdmaServe]]:
    with fake_rdmas(monkeypatch, 2, 512 << 20) as servers:
        yield servers
        until(lambda: not servers[0].agents(), "the agent outlives its job")


def sized(servers: list[FakeRdmaServe], size: str = "128M") -> tuple[str, ...]:
    """One lease of each, and no more."""
    return options_of(*(f"{server.url}?size={size}" for server in servers))


def growing(servers: list[FakeRdmaServe]) -> tuple[str, ...]:
    return options_of(*(server.url for server in servers))


# ---- right bytes


def test_every_word_on_two_servers(servers: list[FakeRdmaServe]) -> None:
    result = run_farmem([compile_c("verify"), "4", "96", "2"], local="32M", options=sized(servers))
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None
    assert result.stats["pool_capacity_bytes"] == 256 * MIB
    for nothing in ("pages_lost", "fetch_retries", "store_errors", "pool_connections_lost"):
        assert result.stats[nothing] == 0, nothing
    for server in servers:
        assert server.stored_bytes() >= 16 * MIB
        assert server.made == 2, "the trial's, and the program's"
        assert not server.leases and not server.queue_pairs


def test_one_agent_does_for_all(servers: list[FakeRdmaServe]) -> None:
    with start_farmem(
        ["sh", "-c", "echo up; exec sleep 60"], local="32M", options=sized(servers)
    ) as job:
        job.await_out("up")
        assert len(servers[0].agents()) == 1
        assert [len(server.leases) for server in servers] == [1, 1]
        assert not any(server.queue_pairs for server in servers), "nothing was asked of any yet"
        job.process.kill()


def test_rdma_and_other_servers_together(servers: list[FakeRdmaServe]) -> None:
    with nbd_server("qemu-nbd", size_mib=128) as nbd, serving(capacity="64M") as serve:
        tcp = f"tcp://127.0.0.1:{serve.port}?size=64M"
        options = (*options_of(nbd.url, tcp), *sized(servers[:1]))
        result = run_farmem([compile_c("verify"), "2", "160", "2"], local="32M", options=options)
        until(lambda: serve.about()["leases"] == 0, "the lease was not given back")
        assert (nbd.folder / "image").stat().st_blocks * 512 >= 16 * MIB
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert servers[0].stored_bytes() >= 16 * MIB
    assert result.stats is not None and result.stats["pool_capacity_bytes"] == 320 * MIB


@pytest.mark.parametrize("mode", ["child", "grand", "malloc", "thread"])
def test_fork(servers: list[FakeRdmaServe], mode: str) -> None:
    """A child has sessions of its own, with each server that it asks something of."""
    result = run_farmem([compile_c("forks"), mode], local="32M", options=sized(servers))
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["forks"] >= 1, result.stats
    assert sum(server.made for server in servers) >= 5


@pytest.mark.safety
def test_queue_pairs_that_fail_are_made_again(servers: list[FakeRdmaServe]) -> None:
    fabric = servers[0].fabric
    fabric["delay_ns_max"], fabric["fail_ppm"] = 100_000, 2000
    result = run_farmem([compile_c("verify"), "4", "64", "3"], local="32M", options=sized(servers))
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["pages_lost"] == 0
    assert fabric["failures"] >= 3


# ---- growing and shrinking


def test_a_job_leases_more_as_it_grows(servers: list[FakeRdmaServe]) -> None:
    result = run_farmem(
        [compile_c("verify"), "2", "256", "1"], local="32M", options=growing(servers)
    )
    assert_ok(result)
    assert_paged(result.stats, 10000, 10000)
    assert b"the pool is full" not in result.stderr
    assert sum(server.leased for server in servers) >= 4
    assert result.stats is not None and result.stats["pool_peak_bytes"] > 128 * MIB
    for nothing in ("pages_lost", "fetch_retries", "store_errors"):
        assert result.stats[nothing] == 0, nothing
    assert not any(server.leases for server in servers)


def test_a_server_is_asked_for_little_at_first(servers: list[FakeRdmaServe]) -> None:
    with start_farmem(
        ["sh", "-c", "echo up; exec sleep 60"], local="32M", options=growing(servers[:1])
    ) as job:
        job.await_out("up")
        assert [part.size_bytes for part in servers[0].parts.values()] == [64 * MIB]
        job.process.kill()


def test_what_is_not_needed_any_more_is_given_back(
    servers: list[FakeRdmaServe], tmp_path: Path
) -> None:
    """While the job goes on: queue pairs and leases go, and nobody is told of a loss."""
    with start_farmem(
        [compile_c("gives_back"), str(tmp_path)], local="32M", options=growing(servers[:1])
    ) as job:
        job.await_out("away")
        most = len(servers[0].leases)
        assert most >= 2
        for step in ("away", "discarded"):
            (tmp_path / step).touch()
        job.await_out("unmapped")
        until(lambda: len(servers[0].leases) < most, "a lease that is given back", LIMIT_S)
        assert {lease for lease, _ in servers[0].queue_pairs.values()} <= servers[0].leases
        for step in ("unmapped", "child", "killed"):
            job.await_out(step)
            (tmp_path / step).touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert b"lost" not in result.stderr and b"answer" not in result.stderr, result.describe()
    assert not servers[0].leases


def test_servers_that_a_registry_names(servers: list[FakeRdmaServe], tmp_path: Path) -> None:
    """One of them is not there; and one is no RDMA's."""
    path = tmp_path / "servers.toml"
    with serving(capacity="64M") as serve:
        urls = [*(server.url for server in servers), "rdma://127.0.0.1:1"]
        urls.append(f"tcp://127.0.0.1:{serve.port}")
        path.write_text(f"servers = {urls}\n")
        result = run_farmem(
            [compile_c("verify"), "2", "192", "1"],
            local="32M",
            options=("--pool", f"registry+file://{path}"),
        )
        until(lambda: serve.about()["leases"] == 0, "the lease was not given back")
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert sum(server.leased for server in servers) >= 1
    assert not any(server.leases for server in servers)


def test_a_host_without_rdma_uses_what_else_is_registered(
    servers: list[FakeRdmaServe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARMEM_TEST_VERBS", "libibverbs-is-not-there.so.1")
    path = tmp_path / "servers.toml"
    with serving(capacity="256M") as serve:
        path.write_text(f'servers = ["{servers[0].url}", "tcp://127.0.0.1:{serve.port}"]\n')
        result = run_farmem(
            [compile_c("verify"), "2", "96", "1"],
            local="32M",
            options=("--pool", f"registry+file://{path}"),
        )
    assert_ok(result)
    assert b"libibverbs can't be loaded" in result.stderr
    assert b"going on without it" in result.stderr
    assert servers[0].leased == 0


# ---- one of them dies


@pytest.mark.safety
@pytest.mark.parametrize("how", ["silent", "ended"])
def test_one_that_dies_takes_its_pages_and_no_others(
    servers: list[FakeRdmaServe], how: str, tmp_path: Path
) -> None:
    """The program looks at every page: right, or SIGBUS.  Some are lost, and some are not."""
    armed = tmp_path / "away"
    servers[0].fabric["delay_ns_max"] = 20_000_000  # so that it has not seen all before one dies
    with start_farmem(
        [compile_c("lost"), str(armed)], local="32M", options=(*sized(servers), *SOON)
    ) as job:
        until(armed.exists, "what is away", LIMIT_S)
        if how == "silent":
            servers[1].silence()
        else:
            servers[1].leases.clear()
            servers[1].end_queue_pairs()
        made = servers[0].made
        result = job.finish(LIMIT_S)
    assert_some_lost(result)
    said = result.stderr.decode()
    assert re.search(rf"{re.escape(servers[1].name)} .*bytes there:? [1-9]|lost; bytes", said), said
    assert servers[0].name not in said, said
    assert servers[0].made == made, "the other's session goes on"


@pytest.mark.safety
@pytest.mark.parametrize("dies", [0, 1])
def test_the_others_take_what_comes_then(
    servers: list[FakeRdmaServe], dies: int, tmp_path: Path
) -> None:
    """The program does not touch what it had there, and needs more: that goes to who lives."""
    with nbd_server(over="unix") as nbd:
        options = (*sized(servers[:1]), *options_of(nbd.url), *SOON)
        with start_farmem(
            [compile_c("newcomer"), str(tmp_path / "go")], local="32M", options=options
        ) as job:
            job.await_out("ready")
            if dies == 0:
                servers[0].silence()
            else:
                nbd.kill()
            (tmp_path / "go").touch()
            result = job.finish(LIMIT_S)
    assert_ok(result)
    assert result.stats is not None and result.stats["pages_lost"] == 0
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.safety
def test_one_that_is_silent_is_waited_for(servers: list[FakeRdmaServe], tmp_path: Path) -> None:
    with start_farmem(
        [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=sized(servers)
    ) as job:
        job.await_out("ready")
        made = servers[0].made
        servers[1].silence()
        job.await_err("does not answer")
        servers[1].silence(False)
        job.await_err("answers again")
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert servers[0].name.encode() not in result.stderr and servers[0].made == made
    assert result.stats is not None and result.stats["pages_lost"] == 0


@pytest.mark.safety
def test_an_agent_that_is_killed_is_started_again(
    servers: list[FakeRdmaServe], tmp_path: Path
) -> None:
    """Each server has its old half taken away before it makes another."""
    with start_farmem(
        [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=sized(servers)
    ) as job:
        job.await_out("ready")
        until(lambda: all(len(server.queue_pairs) == 1 for server in servers), "both in use")
        made = [server.made for server in servers]
        (agent,) = servers[0].agents()
        os.kill(agent, signal.SIGKILL)
        for server, before in zip(servers, made, strict=True):
            until(lambda server=server, before=before: server.made > before, "a new queue pair")
            assert len(server.queue_pairs) == 1
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert result.stats is not None and result.stats["pages_lost"] == 0


def test_a_slow_control_channel_holds_no_other_server_up(servers: list[FakeRdmaServe]) -> None:
    """The child of a fork gets its queue pair of one while the other's control stands still."""
    goes_on, waits = threading.Event(), threading.Event()
    first = servers[0]._queue_pair

    def slow(asked: dict[str, object]) -> tuple[int, dict[str, object]]:
        if servers[0].made >= 2:
            waits.set()
            goes_on.wait(LIMIT_S)
        return first(asked)

    servers[0]._queue_pair = slow  # type: ignore[method-assign]
    with start_farmem([compile_c("forks"), "child"], local="32M", options=sized(servers)) as job:
        with contextlib.ExitStack() as stack:
            stack.callback(goes_on.set)
            until(waits.is_set, "the child's queue pair is asked for", LIMIT_S)
            until(lambda: servers[1].made >= 3, "the child's queue pair of the other", LIMIT_S)
            assert servers[0].made == 2
        assert_ok(job.finish(LIMIT_S))


# ---- before the program starts


def refused(options: tuple[str, ...]) -> str:
    result = run_farmem(["true"], local="32M", options=options, check=False)
    assert result.returncode == 125, result.describe()
    text = result.stderr.decode()
    assert "Traceback" not in text and len(text.splitlines()) >= 2, text
    return text


def test_one_that_can_not_be_reached_is_named(servers: list[FakeRdmaServe]) -> None:
    """And the others' leases are given back."""
    servers[1].silence()
    text = refused(sized(servers))
    assert servers[1].name in text and "can't be reached by RDMA" in text
    assert servers[0].name not in text
    assert not any(server.leases or server.queue_pairs for server in servers)


def test_one_without_rdma_is_named(servers: list[FakeRdmaServe]) -> None:
    servers[1].has_rdma = False
    assert f"{servers[1].name} offers no RDMA" in refused(sized(servers))
    assert not any(server.leases for server in servers)


def test_what_this_host_lacks_is_told(
    servers: list[FakeRdmaServe], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers[0].fabric["wrong"] = 4
    assert "locked memory" in refused(sized(servers))
    assert not any(server.leases for server in servers)
