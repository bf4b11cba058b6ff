"""Several servers in one job: what is evicted is spread over them, every byte is right, and one
that dies takes its own pages with it and nothing else.

Servers of every kind that there is: nbdkit and qemu-nbd, over loopback and Unix sockets, and a real
`farmem serve`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from farmem import _native
from farmem.pools import SERVERS_MAX
from tests.harness import ROOT, assert_ok, assert_paged, compile_c, run_farmem, start_farmem
from tests.pools.fake_serve import TOKEN, fake_serve
from tests.pools.jobs import assert_some_lost, options_of
from tests.pools.nbd_servers import MIB, NbdServer, free_port, nbd_server, until
from tests.pools.serving import serving

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
LIMIT_S = 90
MANY_SERVERS = 10
SOON = ("--pool-timeout", "1s")


def stored_bytes(server: NbdServer) -> int:
    return (server.folder / "image").stat().st_blocks * 512


def test_every_word_on_two_servers() -> None:
    """Both have about the same: the next extent is taken where most is free."""
    with nbd_server("qemu-nbd") as first, nbd_server("qemu-nbd", over="unix") as second:
        result = run_farmem(
            [compile_c("verify"), "4", "96", "2"],
            local="32M",
            options=options_of(first.url, second.url),
        )
        assert_ok(result)
        assert_paged(result.stats, 1000, 1000)
        assert min(stored_bytes(first), stored_bytes(second)) >= 16 * MIB
    assert result.stats is not None
    assert result.stats["pool"] == f"{first.url} {second.url}"
    assert result.stats["pool_capacity_bytes"] == 1024 * MIB
    for nothing in ("pages_lost", "fetch_retries", "store_errors", "pool_connections_lost"):
        assert result.stats[nothing] == 0, nothing


def test_servers_of_all_kinds_and_sizes() -> None:
    """One is full soon; the pool is as large as all of them together."""
    with (
        nbd_server("nbdkit", size_mib=8) as small,
        nbd_server("qemu-nbd", over="unix", size_mib=64) as middle,
        serving(capacity="64M") as serve,
    ):
        urls = (small.url, middle.url, f"tcp://127.0.0.1:{serve.port}?size=64M")
        result = run_farmem(
            [compile_c("verify"), "2", "128", "2"], local="32M", options=options_of(*urls)
        )
        until(lambda: serve.about()["leases"] == 0, "the lease was not given back")
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None
    assert result.stats["pool_capacity_bytes"] == 136 * MIB
    assert result.stats["pool_peak_bytes"] > 72 * MIB


@pytest.mark.parametrize("mode", ["child", "grand", "malloc", "thread"])
def test_fork(mode: str) -> None:
    with nbd_server() as first, nbd_server(over="unix") as second:
        result = run_farmem(
            [compile_c("forks"), mode], local="32M", options=options_of(first.url, second.url)
        )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["forks"] >= 1, result.stats


def test_so_many_that_the_engine_needs_more_threads_than_it_has_at_hand() -> None:
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(nbd_server(over="unix", size_mib=32)) for _ in range(MANY_SERVERS)
        ]
        options = options_of(*(server.url for server in servers))
        for program in (("verify", "2", "128", "1"), ("forks", "child")):
            result = run_farmem([compile_c(program[0]), *program[1:]], local="32M", options=options)
            assert_ok(result)
            assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("mode", ["move", "storm"])
def test_mappings_that_move_across_extents(mode: str) -> None:
    """A transfer never reaches beyond its extent, though pages that were moved lie side by side
    in the pool across the border."""
    with nbd_server() as first, nbd_server(over="unix") as second:
        options = options_of(first.url, second.url)
        assert_ok(run_farmem([compile_c("remap"), mode], local="32M", options=options))


def test_pages_that_are_copied_out() -> None:
    with nbd_server() as first, nbd_server(over="unix") as second:
        result = run_farmem(
            [compile_c("verify"), "2", "96", "2"],
            local="48M",
            evict="copy",
            options=options_of(first.url, second.url),
        )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


def test_space_is_given_back_to_each(tmp_path: Path) -> None:
    with nbd_server("qemu-nbd") as first, nbd_server("qemu-nbd") as second:
        servers = (first, second)
        with start_farmem(
            [compile_c("gives_back"), str(tmp_path)],
            local="32M",
            options=options_of(*(server.url for server in servers)),
        ) as job:
            for step in ("away", "discarded", "unmapped"):
                job.await_out(step)
                for server in servers:
                    if step == "away":
                        until(lambda server=server: stored_bytes(server) >= 24 * MIB, step)
                    elif step == "unmapped":
                        until(lambda server=server: stored_bytes(server) <= 8 * MIB, step)
                (tmp_path / step).touch()
            for step in ("child", "killed"):
                job.await_out(step)
                (tmp_path / step).touch()
            assert_ok(job.finish(LIMIT_S))


# ---- one of them dies


@pytest.mark.safety
def test_one_that_dies_takes_its_pages_and_no_others(tmp_path: Path) -> None:
    """The program looks at every page: right, or SIGBUS.  Some are lost, and some are not."""
    armed = tmp_path / "away"
    with (
        nbd_server() as first,
        nbd_server() as second,
        start_farmem(
            [compile_c("lost"), str(armed)],
            local="32M",
            options=(*options_of(first.url, second.url), *SOON),
        ) as job,
    ):
        until(armed.exists, "what is away")
        second.kill()
        result = job.finish(LIMIT_S)
    assert_some_lost(result)
    said = result.stderr.decode()
    assert re.search(rf"127\.0\.0\.1:{second.port} .*bytes there:? [1-9]", said), said
    assert f"127.0.0.1:{first.port}" not in said, said


@pytest.mark.safety
@pytest.mark.parametrize("dies", [0, 1])
def test_the_others_take_what_comes_then(dies: int, tmp_path: Path) -> None:
    """The program does not touch what it had there, and needs more: that goes to who lives."""
    with nbd_server() as first, nbd_server(over="unix") as second:
        servers = (first, second)
        with start_farmem(
            [compile_c("newcomer"), str(tmp_path / "go")],
            local="32M",
            options=(*options_of(first.url, second.url), *SOON),
        ) as job:
            job.await_out("ready")
            servers[dies].kill()
            (tmp_path / "go").touch()
            result = job.finish(LIMIT_S)
    assert_ok(result)
    assert result.stats is not None and result.stats["pages_lost"] == 0
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.safety
def test_one_that_is_started_anew(tmp_path: Path) -> None:
    """A new epoch: what was there is lost and said to be, nothing goes there again."""
    with (
        nbd_server() as data,
        fake_serve({"port": data.port, "export": TOKEN}) as serve,
        nbd_server(over="unix", size_mib=256) as other,
        start_farmem(
            [compile_c("newcomer"), str(tmp_path / "go")],
            local="32M",
            options=(*options_of(serve.options[1], other.url), *SOON),
        ) as job,
    ):
        job.await_out("ready")
        serve.epoch = "feedface00000002"
        job.await_err("has ended our lease")
        (tmp_path / "go").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert b"lost; bytes" in result.stderr
    assert result.stats is not None and result.stats["pages_lost"] == 0


KEEPER = """
import sys, farmem
region = farmem.Region(48 << 20, local="80M", pool=sys.argv[1:])
view = region.view()
for at in range(0, len(view), 4096):
    view[at:at + 8] = at.to_bytes(8, "little")
region.evict()
region.willneed()
print("ready", flush=True)
sys.stdin.readline()
region.evict()
region.willneed()
wrong = sum(view[at:at + 8] != at.to_bytes(8, "little") for at in range(0, len(view), 4096))
print("wrong", wrong, region.stats().lost_bytes)
"""


@pytest.mark.safety
@pytest.mark.parametrize("defects", ["", "trust_the_dead"])
def test_what_is_here_of_a_dead_servers_pages_is_kept(defects: str) -> None:
    """A page that has not changed is not sent again, unless its copy is known to be lost."""
    with (
        nbd_server() as data,
        fake_serve({"port": data.port, "export": TOKEN}) as serve,
        nbd_server(over="unix", size_mib=256) as other,
        subprocess.Popen(
            [sys.executable, "-c", KEEPER, serve.options[1], other.url],
            cwd=ROOT,
            env={**os.environ, "FARMEM_TEST_DEFECTS": defects},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == b"ready\n", process.stderr.read()
        data.kill()
        serve.epoch = "feedface00000002"
        said = b""
        while b"has ended our lease" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        out, err = process.communicate(b"go\n", LIMIT_S)
        assert (out == b"wrong 0 0\n") == (not defects), (out, said + err)
        assert re.search(rb"lost; bytes:? [1-9]", said), said


@pytest.mark.safety
def test_one_that_stands_still_is_waited_for(tmp_path: Path) -> None:
    with (
        nbd_server() as first,
        nbd_server() as second,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")],
            local="32M",
            options=options_of(first.url, second.url),
        ) as job,
    ):
        job.await_out("ready")
        second.signal(signal.SIGSTOP)
        job.await_err("does not answer")
        second.signal(signal.SIGCONT)
        job.await_err("answers again")
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert f"127.0.0.1:{first.port}".encode() not in result.stderr
    assert result.stats is not None and result.stats["pages_lost"] == 0


# ---- before the program starts


def refused(*urls: str) -> str:
    begin = time.monotonic()
    result = run_farmem(["true"], local="32M", options=options_of(*urls), check=False)
    assert time.monotonic() - begin < 20, "a limit to end a hang; the promise is five seconds"
    assert result.returncode == 125, result.describe()
    text = result.stderr.decode()
    assert "Traceback" not in text and len(text.splitlines()) >= 2, text
    return text


def test_one_that_can_not_be_reached_is_named() -> None:
    """And the others' leases are given back."""
    port = free_port()
    with nbd_server() as data, fake_serve({"port": data.port, "export": TOKEN}) as serve:
        text = refused(data.url, serve.url, f"tcp://127.0.0.1:{port}")
        assert f"127.0.0.1:{port}" in text and "Connection refused" in text
        assert not serve.leases


def test_one_memory_with_two_names() -> None:
    with nbd_server() as server:
        assert "same memory" in refused(server.url, f"nbd://localhost:{server.port}/")
        assert "named twice" in refused(server.url, server.url)


def test_what_is_no_server_stands_alone(tmp_path: Path) -> None:
    with nbd_server() as server:
        assert "is no server" in refused("mem:64M", server.url)
        assert "is no server" in refused(server.url, "mem:64M")


def test_the_environment_names_several() -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(nbd_server(over=over)) for over in ("tcp", "unix")]
        urls = " ".join(server.url for server in servers)
        result = run_farmem(["true"], local="32M", env={"FARMEM_RUN_POOL": urls})
    assert result.stats is not None and result.stats["pool"] == urls


def test_a_program_with_regions() -> None:
    script = (
        "import sys, farmem\n"
        "region = farmem.Region(64 << 20, local='16M', pool=sys.argv[1:])\n"
        "view = region.view()\n"
        "for at in range(0, len(view), 4096):\n"
        "    view[at:at + 8] = at.to_bytes(8, 'little')\n"
        "wrong = sum(view[at:at + 8] != at.to_bytes(8, 'little')"
        " for at in range(0, len(view), 4096))\n"
        "import json; print(json.dumps([wrong, region.stats().remote_bytes]))\n"
    )
    with nbd_server(over="unix") as first, nbd_server(over="unix") as second:
        done = subprocess.run(
            [sys.executable, "-c", script, first.url, second.url],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, done.stderr
    wrong, remote_bytes = json.loads(done.stdout)
    assert wrong == 0 and remote_bytes >= 32 * MIB


def test_the_layout_has_room_for_as_many_as_are_allowed() -> None:
    control = _native.ffi.typeof("struct fm_control")
    servers = dict(control.fields)["pool_servers"].type
    assert servers.length == SERVERS_MAX == _native.lib.FM_POOL_SERVERS_MAX
