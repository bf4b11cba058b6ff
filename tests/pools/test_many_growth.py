"""A pool on servers grows ahead of need and shrinks when it is not needed, and servers are found in
a registry: on real `farmem serve`s, with a program that checks every word.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import assert_ok, assert_paged, compile_c, run_farmem, start_farmem
from tests.pools.jobs import options_of
from tests.pools.nbd_servers import MIB
from tests.pools.serving import Server, serving, until

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
LIMIT_S = 90
FULL = b"the pool is full"
SLEEPER = ("sh", "-c", "echo up; exec sleep 60")


def url_of(server: Server) -> str:
    return f"tcp://127.0.0.1:{server.port}"


def lent_bytes(server: Server) -> int:
    about = server.about()
    return int(about["capacity_bytes"] - about["free_bytes"])


def leases(server: Server) -> int:
    return int(server.about()["leases"])


def test_a_job_leases_more_as_it_grows() -> None:
    with serving(capacity="512M") as server:
        result = run_farmem(
            [compile_c("verify"), "2", "256", "1"], local="32M", options=options_of(url_of(server))
        )
        assert len([line for line in server.log.splitlines() if " to '" in line]) >= 3
        until(lambda: leases(server) == 0, "the leases were not given back")
    assert_ok(result)
    assert_paged(result.stats, 10000, 10000)
    assert FULL not in result.stderr
    assert result.stats is not None
    assert result.stats["pool_capacity_bytes"] >= result.stats["pool_peak_bytes"] > 128 * MIB
    for nothing in ("pages_lost", "fetch_retries", "store_errors"):
        assert result.stats[nothing] == 0, nothing


def test_a_job_begins_with_little() -> None:
    """No more than its budget suggests, but not less than what a small program may need."""
    with serving(capacity="512M") as server:
        for local, lent in (("32M", 64), ("128M", 128)):
            options = options_of(url_of(server))
            with start_farmem([*SLEEPER], local=local, options=options) as job:
                job.await_out("up")
                assert lent_bytes(server) == lent * MIB
                job.process.kill()
                job.finish(LIMIT_S)
            until(lambda: leases(server) == 0, "the lease was not given back")


def test_a_size_is_leased_at_once() -> None:
    url = "?size=300M"
    with (
        serving(capacity="512M") as server,
        start_farmem([*SLEEPER], local="32M", options=options_of(url_of(server) + url)) as job,
    ):
        job.await_out("up")
        assert lent_bytes(server) == 300 * MIB and leases(server) == 1


def test_what_is_not_needed_any_more_is_given_back(tmp_path: Path) -> None:
    """While the job goes on; and nobody is told that anything was lost."""
    with (
        serving(capacity="512M") as server,
        start_farmem(
            [compile_c("gives_back"), str(tmp_path)],
            local="32M",
            options=options_of(url_of(server)),
        ) as job,
    ):
        job.await_out("away")
        most = lent_bytes(server)
        assert most > 96 * MIB
        (tmp_path / "away").touch()
        job.await_out("discarded")
        (tmp_path / "discarded").touch()
        job.await_out("unmapped")
        until(lambda: lent_bytes(server) < most, "a lease that is given back", LIMIT_S)
        for step in ("unmapped", "child", "killed"):
            job.await_out(step)
            (tmp_path / step).touch()
        result = job.finish(LIMIT_S)
        until(lambda: leases(server) == 0, "the leases were not given back")
    assert_ok(result)
    assert b"lost" not in result.stderr and b"answer" not in result.stderr, result.describe()


def test_it_goes_on_with_another_server_when_one_is_full() -> None:
    with serving(capacity="64M") as small, serving(capacity="256M") as large:
        result = run_farmem(
            [compile_c("verify"), "2", "192", "1"],
            local="32M",
            options=options_of(url_of(small), url_of(large)),
        )
        assert "MiB to" in small.log and "MiB to" in large.log
    assert_ok(result)
    assert FULL not in result.stderr
    assert result.stats is not None and result.stats["pool_peak_bytes"] > 64 * MIB


@pytest.mark.safety
def test_it_grows_on_when_a_server_has_died(tmp_path: Path) -> None:
    """What it had there it does not touch; what it needs more it gets of the other."""
    with serving(capacity="512M") as first, serving(capacity="512M") as second:
        urls = options_of(url_of(first), url_of(second))
        with start_farmem(
            [compile_c("newcomer"), str(tmp_path / "go")],
            local="32M",
            options=(*urls, "--pool-timeout", "1s"),
        ) as job:
            job.await_out("ready")
            before = second.log.count("MiB to")
            first.process.kill()
            first.process.wait(LIMIT_S)
            (tmp_path / "go").touch()
            result = job.finish(LIMIT_S)
        assert second.log.count("MiB to") > before
    assert_ok(result)
    assert result.stats is not None and result.stats["pages_lost"] == 0


def test_full_everywhere_is_said_once_and_harms_nobody() -> None:
    with serving(capacity="32M") as first, serving(capacity="32M") as second:
        result = run_farmem(
            [compile_c("verify"), "2", "160", "1"],
            local="32M",
            options=options_of(url_of(first), url_of(second)),
        )
    assert_ok(result)
    assert result.stderr.count(FULL) == 1, result.describe()
    assert result.stats is not None
    assert result.stats["pages_lost"] == 0 and result.stats["pool_capacity_bytes"] == 64 * MIB


# ---- servers that are found in a registry


def register(registry: str) -> tuple[str, ...]:
    return ("--register", registry)


def registered(keeper: Server) -> int:
    return len(keeper.ask("GET", "/v1/registry")[1]["servers"])


def test_a_job_uses_what_is_registered() -> None:
    with serving("--registry", capacity="128M") as keeper:
        registry = f"registry+http://127.0.0.1:{keeper.port}"
        with serving(*register(registry), capacity="128M") as other:
            until(lambda: registered(keeper) == 2, "both registered")
            result = run_farmem(
                [compile_c("verify"), "2", "192", "1"],
                local="32M",
                options=("--pool", registry),
            )
            assert "MiB to" in keeper.log and "MiB to" in other.log
            until(lambda: leases(keeper) + leases(other) == 0, "the leases were not given back")
    assert_ok(result)
    assert_paged(result.stats, 5000, 1000)
    assert result.stats is not None and result.stats["pages_lost"] == 0


def test_a_server_that_is_registered_later_is_used(tmp_path: Path) -> None:
    """The job is begun with one that has too little."""
    with serving("--registry", capacity="64M") as keeper:
        registry = f"registry+http://127.0.0.1:{keeper.port}"
        with start_farmem(
            [compile_c("newcomer"), str(tmp_path / "go")],
            local="32M",
            options=("--pool", registry),
        ) as job:
            job.await_out("ready")
            with serving(*register(registry), capacity="256M") as other:
                until(lambda: leases(other) >= 1, "a lease of the new server", LIMIT_S)
                (tmp_path / "go").touch()
                result = job.finish(LIMIT_S)
                until(lambda: leases(other) == 0, "the lease was not given back")
    assert_ok(result)


def test_one_that_is_registered_and_gone_is_passed_by(tmp_path: Path) -> None:
    path = tmp_path / "servers.toml"
    with serving(capacity="128M") as server:
        path.write_text(f'servers = ["tcp://127.0.0.1:1", "{url_of(server)}"]\n')
        result = run_farmem(
            [compile_c("verify"), "1", "64", "1"],
            local="32M",
            options=("--pool", f"registry+file://{path}"),
        )
    assert_ok(result)
    assert b"127.0.0.1:1 can't be reached" in result.stderr
    assert b"going on without it" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("servers = []", ("names no server that can be used", "farmem pools --registry")),
        ('servers = ["tcp://127.0.0.1:1"]', ("names no server", "Connection refused")),
        ("x", ("is not TOML",)),
    ],
)
def test_a_registry_without_a_server(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "servers.toml"
    path.write_text(text)
    options = ("--pool", f"registry+file://{path}")
    result = run_farmem(["true"], local="32M", options=options, check=False)
    assert result.returncode == 125, result.describe()
    assert all(word in result.stderr.decode() for word in words), result.describe()
    assert b"Traceback" not in result.stderr


def test_a_registry_that_can_not_be_asked() -> None:
    with serving(capacity="64M") as server:
        for url, word in (
            (f"registry+http://127.0.0.1:{server.port}", "keeps no registry"),
            ("registry+http://127.0.0.1:1", "Connection refused"),
            ("registry+etcd://127.0.0.1:1,127.0.0.1:2/farmem", "can't be reached"),
        ):
            result = run_farmem(["true"], local="32M", options=("--pool", url), check=False)
            assert result.returncode == 125, result.describe()
            assert word in result.stderr.decode() and b"Traceback" not in result.stderr
