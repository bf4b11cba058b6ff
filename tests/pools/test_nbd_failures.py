"""Pools `nbd://` when the server fails, in every way that a server can: right bytes, or a wait, or
SIGBUS and a message that names the server; never a wrong byte.

Real servers are killed, stopped and started anew; a fake one breaks the protocol.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.harness import Result, assert_ok, assert_paged, compile_c, run_farmem, start_farmem
from tests.pools.fake_nbd import WRONGS, fake_nbd
from tests.pools.nbd_servers import nbd_server

pytestmark = [pytest.mark.pools, pytest.mark.safety, pytest.mark.uffd]
LIMIT_S = 90
SOON = ("--pool-timeout", "2s")


def assert_lost(result: Result, name: str) -> None:
    """Ended by SIGBUS, and told why; the program itself checks every word that it meets."""
    assert result.returncode == -signal.SIGBUS, result.describe()
    assert b"page lost" in result.stderr and name.encode() in result.stderr, result.describe()
    assert result.stats is not None and result.stats["pages_lost"] >= 1


# ---- the server dies, stands still, comes back


def test_a_server_that_is_killed_is_sigbus(tmp_path: Path) -> None:
    with (
        nbd_server() as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")],
            local="32M",
            options=(*server.options, *SOON),
        ) as job,
    ):
        job.await_out("ready")
        server.kill()
        result = job.finish(LIMIT_S)
        assert_lost(result, f"127.0.0.1:{server.port}")
        assert b"does not answer" in result.stderr and b"bytes there" in result.stderr
        # What has been tried until the deadline is not tried three times.
        assert result.stats is not None and result.stats["fetch_retries"] == 0


def test_who_touches_nothing_lives_on(tmp_path: Path) -> None:
    """The server dies, for longer than it is waited for: nothing happens to a program that needs
    nothing from it."""
    with (
        nbd_server(over="unix") as server,
        start_farmem(
            [compile_c("bystander"), str(tmp_path / "stop")],
            local="32M",
            options=(*server.options, "--pool-timeout", "300ms"),
        ) as job,
    ):
        job.await_out("ready")
        server.kill()
        time.sleep(1)
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert_paged(result.stats, 1000, 0)
    assert result.stats is not None and result.stats["pages_lost"] == 0


def test_each_lost_page_is_sigbus_and_can_be_thrown_away(tmp_path: Path) -> None:
    """The program looks at every page of its own: right, or SIGBUS (EFAULT in a system call)."""
    armed = tmp_path / "away"
    with (
        nbd_server() as server,
        start_farmem(
            [compile_c("lost"), str(armed)],
            local="32M",
            options=(*server.options, "--pool-timeout", "300ms"),
        ) as job,
    ):
        end = time.monotonic() + LIMIT_S
        while not armed.exists():
            assert time.monotonic() < end and job.process.poll() is None
            time.sleep(0.001)
        server.kill()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert b"lost=0 " not in result.stdout, result.describe()


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_a_server_that_stands_still_is_waited_for(kind: str, tmp_path: Path) -> None:
    with (
        nbd_server(kind) as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        server.signal(signal.SIGSTOP)
        job.await_err("does not answer")
        server.signal(signal.SIGCONT)
        job.await_err("answers again")
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert result.stats is not None
    assert result.stats["pages_lost"] == 0
    assert result.stats["pool_silent_ns"] > 1_000_000_000


def test_a_server_that_comes_back_with_what_it_had(tmp_path: Path) -> None:
    """Its file has outlived it: every byte is there."""
    with (
        nbd_server("qemu-nbd") as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        for _ in range(3):
            server.kill()
            server.start()
            time.sleep(0.3)
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert result.stats is not None
    assert result.stats["pages_lost"] == 0 and result.stats["pool_connections_lost"] >= 3


def test_a_server_that_comes_back_with_nothing(tmp_path: Path) -> None:
    """It has the same name, the same size, and zeros: no page of it is taken for ours."""
    with (
        nbd_server() as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        server.kill()
        server.start()
        result = job.finish(LIMIT_S)
    assert result.returncode == -signal.SIGBUS, result.describe()
    assert b"page lost" in result.stderr


def test_an_export_that_is_gone_is_lost_at_once(tmp_path: Path) -> None:
    with (
        fake_nbd() as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        server.refusal = 0x80000006
        server.cut()
        result = job.finish(LIMIT_S)
    assert_lost(result, "no longer has our export")
    assert b"an export" not in result.stderr.replace(b"an%20export", b"")


def test_a_fork_while_the_server_stands_still(tmp_path: Path) -> None:
    """What is on its way out is waited for: the child has all of it."""
    with nbd_server(over="unix") as server:
        with start_farmem(
            [compile_c("forks"), "child"], local="32M", options=server.options
        ) as job:
            for _ in range(4):
                time.sleep(0.3)
                server.signal(signal.SIGSTOP)
                time.sleep(0.3)
                server.signal(signal.SIGCONT)
            result = job.finish(LIMIT_S)
        assert_ok(result)


# ---- a server that breaks the protocol


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_server_that_breaks_the_protocol(wrong: str) -> None:
    """Now and then: the connection ends, and what was asked for is asked for again."""
    with fake_nbd() as server:
        server.wrong, server.every = wrong, 150
        result = run_farmem(
            [compile_c("verify"), "4", "64", "2"], local="32M", options=server.options
        )
        assert_ok(result)
        assert_paged(result.stats, 1000, 1000)
        assert server.done >= 10
    assert result.stats is not None
    assert result.stats["pages_lost"] == 0
    assert result.stats["pool_connections_lost"] >= 10


def test_a_server_that_only_breaks_the_protocol(tmp_path: Path) -> None:
    with (
        fake_nbd() as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")],
            local="32M",
            options=(*server.options, *SOON),
        ) as job,
    ):
        job.await_out("ready")
        server.wrong, server.every = "rubbish", 1
        result = job.finish(LIMIT_S)
    assert_lost(result, "has not answered for too long")


def test_changed_bytes_are_read_again() -> None:
    with fake_nbd() as server:
        server.wrong, server.every = "corrupt", 150
        result = run_farmem(
            [compile_c("verify"), "4", "64", "2"], local="32M", options=server.options
        )
        assert_ok(result)
        assert server.done >= 10
    assert result.stats is not None
    assert result.stats["fetch_retries"] >= 10 and result.stats["pages_lost"] == 0


def test_bytes_that_stay_changed_are_lost_and_never_seen(tmp_path: Path) -> None:
    with (
        fake_nbd() as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        server.wrong, server.every = "corrupt", 1
        result = job.finish(LIMIT_S)
    assert result.returncode == -signal.SIGBUS, result.describe()
    assert b"page lost" in result.stderr and b"wrong" not in result.stderr


@pytest.mark.parametrize("defects", [(), ("no_hash_check",)])
def test_the_check_of_the_bytes_is_what_notices(defects: tuple[str, ...]) -> None:
    """The twin of the two before: without the check the program sees what was changed."""
    with fake_nbd() as server:
        server.wrong, server.every = "corrupt", 20
        result = run_farmem(
            [compile_c("verify"), "2", "64", "2"],
            local="32M",
            defects=defects,
            options=server.options,
            check=False,
        )
    assert (result.returncode == 0) == (not defects), result.describe()


def test_a_server_that_refuses_to_store(tmp_path: Path) -> None:
    """It takes nothing more after a while: pages stay, over the budget, and it is said."""
    with (
        nbd_server("full") as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        (server.folder / "full").touch()
        job.await_err("could not store pages")
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert result.stats is not None
    assert result.stats["store_errors"] >= 1 and result.stats["pages_lost"] == 0
