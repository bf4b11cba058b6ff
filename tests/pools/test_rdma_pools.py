"""Pools `rdma://`: every byte is right, moved by one-sided reads and writes alone, whatever fails.

The server and the device are fakes here (fake_fabric.py): the device is strict, counts what it
does, and fails when it is told to.  The agent, the engine and the control plane are the real ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    ROOT,
    Result,
    assert_ok,
    assert_paged,
    compile_c,
    run_farmem,
    start_farmem,
)
from tests.pools.fake_fabric import FakeRdmaServe, fake_rdma
from tests.pools.fake_serve import TOKEN
from tests.pools.jobs import endless, stop
from tests.pools.serving import MIB, until

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
LIMIT_S = 90
DELAY_NS = 50_000
SOON = ("--pool-timeout", "2s")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRdmaServe]:
    with fake_rdma(monkeypatch) as server:
        yield server
        until(lambda: not server.agents(), "the agent outlives its job")


# ---- right bytes


def test_every_word(server: FakeRdmaServe) -> None:
    result = run_farmem([compile_c("verify"), "4", "96", "2"], local="48M", options=server.options)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None
    assert result.stats["pool"] == server.options[1]
    assert result.stats["pool_capacity_bytes"] == 256 * MIB
    for nothing in ("pages_lost", "fetch_retries", "store_errors", "pool_connections_lost"):
        assert result.stats[nothing] == 0, nothing
    # Each page that was moved was moved by the device, and the server was asked for nothing.
    fabric = server.fabric
    assert fabric["reads"] * 32 >= result.stats["pages_fetched"] >= 1000
    assert fabric["writes"] * 32 >= result.stats["pages_stored"] >= 1000
    asked = [path for method, path, _ in server.asked if method == "POST"]
    assert sum("queue-pairs" in path for path in asked) == 2, "the trial's, and the program's"


def test_pages_that_are_copied_out(server: FakeRdmaServe) -> None:
    result = run_farmem(
        [compile_c("verify"), "2", "96", "2"], local="48M", evict="copy", options=server.options
    )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("mode", ["child", "grand", "malloc", "thread"])
def test_fork(server: FakeRdmaServe, mode: str) -> None:
    """A child has a queue pair of its own, and counts on the same slots."""
    result = run_farmem([compile_c("forks"), mode], local="32M", options=server.options)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["forks"] >= 1, result.stats
    assert server.made >= 3


def test_a_lease_is_got_kept_and_given_back(server: FakeRdmaServe, tmp_path: Path) -> None:
    with endless(tmp_path, server.options) as job:
        assert len(server.leases) == 1 and len(server.queue_pairs) == 1
        until(lambda: server.renewals >= 3, "renewals")
        result = stop(job, tmp_path)
        until(lambda: not server.leases, "the lease was not given back")
    text = result.stderr.decode() + repr(result.stats)
    secrets = [TOKEN, *map(str, server.numbers), str(server.fabric["rkey"])]
    assert not [word for word in secrets if word in text], "a secret was told"


def test_filters_stand_before_it(server: FakeRdmaServe) -> None:
    result = run_farmem(
        [compile_c("verify"), "2", "64", "2"],
        local="32M",
        filters=["stats", "error:corrupt=0.001,seed=3", "checksum", f"delay:rtt={DELAY_NS}ns"],
        options=server.options,
    )
    assert_ok(result)
    assert result.stats is not None and result.stats["fetch_retries"] >= 1
    for kind in ("fetch", "store"):
        number = result.stats["pool_fetches" if kind == "fetch" else "pool_stores"]
        assert number >= 100 and result.stats[f"pool_{kind}_ns"] >= number * DELAY_NS


def test_a_program_with_regions(server: FakeRdmaServe) -> None:
    script = (
        "import sys, farmem\n"
        "region = farmem.Region(64 << 20, local='16M', pool=sys.argv[1])\n"
        "view = region.view()\n"
        "for at in range(0, len(view), 4096):\n"
        "    view[at:at + 8] = at.to_bytes(8, 'little')\n"
        "wrong = sum(view[at:at + 8] != at.to_bytes(8, 'little')"
        " for at in range(0, len(view), 4096))\n"
        "print(wrong)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, server.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert server.fabric["reads"] >= 100 and server.fabric["writes"] >= 100


# ---- failures


@pytest.mark.safety
def test_queue_pairs_that_fail_are_made_again(server: FakeRdmaServe) -> None:
    """Work ends half done, and all behind it is flushed: it is done again, and no byte is wrong."""
    server.fabric["delay_ns_max"] = 100_000
    server.fabric["fail_ppm"] = 2000
    result = run_farmem([compile_c("verify"), "4", "64", "3"], local="32M", options=server.options)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["pages_lost"] == 0
    assert server.fabric["failures"] >= 3
    assert result.stats["pool_connections_lost"] >= 2


@pytest.mark.safety
def test_a_server_that_does_not_answer_is_waited_for(server: FakeRdmaServe, tmp_path: Path) -> None:
    with endless(tmp_path, server.options) as job:
        server.fabric["silent"] = 1
        job.await_err("does not answer")
        server.fabric["silent"] = 0
        job.await_err("answers again")
        result = stop(job, tmp_path)
    assert result.stats is not None and result.stats["pages_lost"] == 0


@pytest.mark.safety
def test_a_server_that_has_gone_is_sigbus(server: FakeRdmaServe, tmp_path: Path) -> None:
    with endless(tmp_path, (*server.options, *SOON)) as job:
        server.fabric["silent"] = 1
        result = job.finish(LIMIT_S)
    assert result.returncode == -signal.SIGBUS, result.describe()
    assert b"has not answered for too long" in result.stderr and b"page lost" in result.stderr
    assert server.url.removeprefix("rdma://").encode() in result.stderr


@pytest.mark.safety
def test_a_lease_that_has_ended_is_lost(server: FakeRdmaServe, tmp_path: Path) -> None:
    with endless(tmp_path, server.options) as job:
        server.leases.clear()
        server.end_queue_pairs()
        result = job.finish(LIMIT_S)
    assert result.returncode == -signal.SIGBUS, result.describe()
    assert b"page lost" in result.stderr and b"has ended our lease" in result.stderr


@pytest.mark.safety
def test_an_agent_that_is_killed_is_started_again(server: FakeRdmaServe, tmp_path: Path) -> None:
    with endless(tmp_path, server.options) as job:
        killed: set[int] = set()
        for _ in range(3):
            (agent,) = until(lambda: [p for p in server.agents() if p not in killed], "an agent")
            made = server.made
            os.kill(agent, signal.SIGKILL)
            killed.add(agent)
            until(lambda made=made: server.made > made, "a new queue pair")
            assert len(server.queue_pairs) == 1, "the killed agent's is taken away first"
        result = stop(job, tmp_path)
    assert b"it is started again" in result.stderr
    assert result.stats is not None and result.stats["pages_lost"] == 0


@pytest.mark.safety
def test_an_agent_that_stands_still_is_waited_for(server: FakeRdmaServe, tmp_path: Path) -> None:
    with endless(tmp_path, server.options) as job:
        (agent,) = server.agents()
        os.kill(agent, signal.SIGSTOP)
        job.await_err("does not answer")
        os.kill(agent, signal.SIGCONT)
        job.await_err("answers again")
        stop(job, tmp_path)


def test_the_agent_ends_with_its_job(server: FakeRdmaServe, tmp_path: Path) -> None:
    """Whoever is killed: the program, then also the supervisor, which asks nobody to end then."""
    for kills_supervisor in (False, True):
        with endless(tmp_path, server.options) as job:
            supervisor = job.supervisor()
            assert len(server.agents()) == 1
            if kills_supervisor:
                os.kill(supervisor, signal.SIGKILL)
            os.kill(job.process.pid, signal.SIGKILL)
            until(lambda: not server.agents(), "the agent's end")
    until(lambda: server.leases, "the lease of the one that was killed is left to its server")


def test_the_agent_holds_nothing_of_the_callers(server: FakeRdmaServe, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with start_farmem(
        [compile_c("endless"), str(tmp_path / "stop")],
        local="32M",
        options=server.options,
        pass_fds=(writing,),
    ) as job:
        os.close(writing)
        job.await_out("ready")
        (agent,) = server.agents()
        theirs = {
            os.stat(f"/proc/{agent}/fd/{fd}").st_ino for fd in os.listdir(f"/proc/{agent}/fd")
        }
        assert os.fstat(reading).st_ino not in theirs
        assert os.getsid(agent) not in (job.process.pid, os.getsid(0))
        stop(job, tmp_path)
    os.close(reading)


# ---- before the program starts


def refused(url: str, *words: str, options: tuple[str, ...] = ()) -> Result:
    """The pool is refused, soon, with an error that holds these words, and no traceback."""
    begin = time.monotonic()
    result = run_farmem(["true"], local="32M", options=("--pool", url, *options), check=False)
    assert time.monotonic() - begin < 20, "a limit to end a hang; the promise is five seconds"
    assert result.returncode == 125, result.describe()
    text = result.stderr.decode()
    assert all(word in text for word in words), (words, text)
    assert "Traceback" not in text and len(text.splitlines()) >= 2, text
    return result


def test_a_server_without_rdma_names_its_tcp(server: FakeRdmaServe) -> None:
    server.has_rdma = False
    name = server.url.removeprefix("rdma://")
    refused(server.url, "offers no RDMA", f"tcp://{name}")
    assert not server.leases


def test_a_server_that_refuses_a_queue_pair(server: FakeRdmaServe) -> None:
    server.refusal = (
        507,
        {"error": "there are too many queue pairs", "hint": "try another server"},
    )
    refused(server.url, "too many queue pairs", "try another server")
    assert not server.leases


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("qpn", value) for value in (None, -1, 1 << 24, "7", True, 7.0)),
        *(("psn", -1), ("mtu", 1500), ("mtu", None), ("rkey", 1 << 32), ("address", -1)),
        *(("bytes", 4096), ("gid", "x"), ("gid", None), ("gid", "fe80::1%lo 1"), ("lid", 1 << 16)),
        *(("queue_pair", "../x"), ("queue_pair", ""), ("reads_in_flight", 0)),
    ],
)
def test_a_half_that_is_not_understood(server: FakeRdmaServe, key: str, value: object) -> None:
    server.changes = {key: value}
    refused(server.url, "queue pair")


def test_a_server_that_can_not_be_reached_by_rdma(server: FakeRdmaServe) -> None:
    server.fabric["silent"] = 1
    refused(server.url, "can't be reached by RDMA", "retry counter exceeded", "--rdma-gid-index")
    assert not server.leases and not server.queue_pairs


def test_no_way_to_the_servers_gid(server: FakeRdmaServe) -> None:
    server.changes = {"gid": "::ffff:10.9.9.9"}
    refused(server.url, "can't be reached by RDMA", "no way to the server's GID")


def test_nobody_answers_the_control_channel(server: FakeRdmaServe) -> None:
    refused("rdma://127.0.0.1:1", "127.0.0.1:1", "Connection refused")
    refused("rdma://127.0.0.1", "names no port", "rdma://127.0.0.1:PORT")


@pytest.mark.parametrize(
    ("wrong", "options", "words"),
    [
        (1, (), ("no RDMA device here", "ibverbs-providers")),
        (2, (), ("fake0", "no active port")),
        (3, (), ("fake0", "has no GID")),
        (4, (), ("locked memory", "ulimit -l")),
        (0, ("--rdma-device", "mlx5_0"), ("no RDMA device mlx5_0",)),
        (0, ("--rdma-gid-index", "6"), ("no usable GID of index 6",)),
    ],
)
def test_what_this_host_lacks(
    monkeypatch: pytest.MonkeyPatch, wrong: int, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with fake_rdma(monkeypatch, wrong=wrong) as server:
        refused(server.url, *words, options=options)
        until(lambda: not server.agents(), "the agent's end")
        assert not server.leases


def test_the_device_and_the_gid_can_be_named(server: FakeRdmaServe) -> None:
    options = (*server.options, "--rdma-device", "fake0", "--rdma-gid-index", "3")
    run_farmem(["true"], local="32M", options=options)


def test_a_gid_that_does_not_reach_the_server(server: FakeRdmaServe) -> None:
    """The index counts: another GID has no way there."""
    seen: list[str] = []

    def look(asked: dict[str, str]) -> tuple[int, dict[str, object]]:
        seen.append(asked["gid"])
        return 507, {}

    server._queue_pair = look  # type: ignore[method-assign,assignment]
    refused(server.url, "gives no queue pair", options=("--rdma-gid-index", "1"))
    assert seen == ["fe80::1"]


def test_no_library(server: FakeRdmaServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARMEM_TEST_VERBS", "libibverbs-is-not-there.so.1")
    refused(server.url, "libibverbs can't be loaded", "apt-get install libibverbs1")


def test_a_command_that_does_not_exist_leaves_nothing(server: FakeRdmaServe) -> None:
    result = run_farmem(["/nonexistent/command"], local="32M", options=server.options, check=False)
    assert result.returncode == 127
    until(lambda: not server.leases and not server.agents(), "lease and agent")


def test_a_slow_answer_of_the_server_holds_no_program_up(
    server: FakeRdmaServe, tmp_path: Path
) -> None:
    """Who forks while the control channel stands still gets its queue pair when that answers."""
    goes_on = threading.Event()
    first = server._queue_pair

    def slow(asked: dict[str, object]) -> tuple[int, dict[str, object]]:
        if server.made >= 2:
            goes_on.wait(LIMIT_S)
        return first(asked)

    server._queue_pair = slow  # type: ignore[method-assign]
    with start_farmem([compile_c("forks"), "child"], local="32M", options=server.options) as job:
        until(lambda: server.made >= 2, "the program's queue pair")
        time.sleep(0.5)
        goes_on.set()
        assert_ok(job.finish(LIMIT_S))


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("rdma_device='mlx5_0'", ["no RDMA device mlx5_0"]),
        ("rdma_gid_index=77", ["no usable GID of index 77"]),
        ("rdma_gid_index=-1", ["rdma_gid_index is -1", "from 0 to 255"]),
        ("rdma_gid_index='3'", ["rdma_gid_index is '3'", "from 0 to 255"]),
        ("rdma_device='fake0', rdma_gid_index=3", ["right"]),
    ],
)
def test_a_budget_names_device_and_gid(named: str, words: list[str], server: FakeRdmaServe) -> None:
    """As the options of `farmem run` do."""
    program = (
        "import sys, farmem\n"
        "try:\n"
        f"    farmem.Budget('16M', pool=sys.argv[1], {named})\n"
        "    print('right')\n"
        "except farmem.FarmemError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, server.options[1]],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), (done.stdout, done.stderr)
