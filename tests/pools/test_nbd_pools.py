"""Pools `nbd://` and `nbd+unix://`, on servers that nobody here wrote: every byte is right.

The servers are nbdkit's memory plugin (several connections) and qemu-nbd on a file (one), over
loopback and over a Unix socket.  What happens when a server fails is in test_nbd_failures.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from farmem import _native
from tests.harness import (
    ROOT,
    assert_ok,
    assert_paged,
    compile_c,
    run_farmem,
    start_farmem,
)
from tests.pools.fake_nbd import fake_nbd
from tests.pools.nbd_servers import MIB, nbd_server, until

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
LIMIT_S = 60
DELAY_NS = 50_000


@pytest.mark.parametrize("over", ["tcp", "unix"])
@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_every_word(kind: str, over: str) -> None:
    with nbd_server(kind, over) as server:
        result = run_farmem(
            [compile_c("verify"), "4", "96", "2"], local="48M", options=server.options
        )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None
    assert result.stats["pool"] == server.url
    assert result.stats["pool_capacity_bytes"] == 512 * MIB
    for nothing in ("pages_lost", "fetch_retries", "store_errors", "pool_connections_lost"):
        assert result.stats[nothing] == 0, nothing


def test_pages_that_are_copied_out() -> None:
    with nbd_server() as server:
        result = run_farmem(
            [compile_c("verify"), "2", "96", "2"],
            local="48M",
            evict="copy",
            options=server.options,
        )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("mode", ["child", "grand", "malloc", "thread"])
def test_fork(mode: str) -> None:
    """A child has connections of its own, and counts on the same slots."""
    with nbd_server() as server:
        result = run_farmem([compile_c("forks"), mode], local="32M", options=server.options)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["forks"] >= 1, result.stats


def test_fork_with_one_connection() -> None:
    with nbd_server("qemu-nbd") as server:
        assert_ok(run_farmem([compile_c("forks"), "child"], local="32M", options=server.options))


def test_filters_stand_before_it() -> None:
    """Corrupted on this side of the wire, delayed, checked: as before any other pool."""
    with nbd_server() as server:
        result = run_farmem(
            [compile_c("verify"), "2", "64", "8"],
            local="32M",
            # So seldom that hardly ever the second reading of the same page is struck too.
            filters=["stats", "error:corrupt=0.0003,seed=3", "checksum", f"delay:rtt={DELAY_NS}ns"],
            options=server.options,
        )
    assert_ok(result)
    assert result.stats is not None and result.stats["fetch_retries"] >= 1
    for kind in ("fetch", "store"):
        number = result.stats["pool_fetches" if kind == "fetch" else "pool_stores"]
        assert number >= 100 and result.stats[f"pool_{kind}_ns"] >= number * DELAY_NS


def test_space_is_given_back(tmp_path: Path) -> None:
    """What a program throws away leaves the server's file."""
    with nbd_server("qemu-nbd", size_mib=1024) as server:
        image = server.folder / "image"

        def used_bytes() -> int:
            return image.stat().st_blocks * 512

        with start_farmem(
            [compile_c("gives_back"), str(tmp_path)], local="32M", options=server.options
        ) as job:
            for step in ("away", "discarded", "unmapped"):
                job.await_out(step)
                if step == "away":
                    until(lambda: used_bytes() >= 64 * MIB, step)
                else:
                    most = 66 * MIB if step == "discarded" else 8 * MIB
                    until(lambda most=most: used_bytes() <= most, step)
                (tmp_path / step).touch()
            for step in ("child", "killed"):
                job.await_out(step)
                (tmp_path / step).touch()
            assert_ok(job.finish(LIMIT_S))


def test_replies_in_any_order() -> None:
    with fake_nbd() as server:
        server.wrong, server.every = "reorder", 3
        result = run_farmem(
            [compile_c("verify"), "4", "64", "2"], local="32M", options=server.options
        )
        assert_ok(result)
        assert_paged(result.stats, 1000, 1000)
        assert server.done >= 100
    assert result.stats is not None and result.stats["pool_connections_lost"] == 0


def test_trim_is_asked_for_whole_extents() -> None:
    with fake_nbd() as server:
        assert_ok(
            run_farmem([compile_c("verify"), "1", "64", "1"], local="32M", options=server.options)
        )
        assert server.trimmed_bytes % (2 * MIB) == 0


def test_a_program_with_regions() -> None:
    """The Python API takes the same URLs."""
    script = (
        "import sys, farmem\n"
        "region = farmem.Region(64 << 20, local='16M', pool=sys.argv[1])\n"
        "view = region.view()\n"
        "for at in range(0, len(view), 4096):\n"
        "    view[at:at + 8] = at.to_bytes(8, 'little')\n"
        "wrong = sum(view[at:at + 8] != at.to_bytes(8, 'little')"
        " for at in range(0, len(view), 4096))\n"
        "import json; print(json.dumps([wrong, region.stats().remote_bytes]))\n"
    )
    with nbd_server(over="unix") as server:
        done = subprocess.run(
            [sys.executable, "-c", script, server.url],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, done.stderr
    wrong, remote_bytes = json.loads(done.stdout)
    assert wrong == 0 and remote_bytes >= 32 * MIB


def test_the_layout_holds_what_a_url_can_name() -> None:
    """The bounds that Python checks are those of the control segment."""
    from farmem import servers

    there = _native.ffi.new("struct fm_pool_server *")
    assert len(there.export_name) == servers.EXPORT_BYTES_MAX == _native.lib.FM_POOL_EXPORT_BYTES
    assert len(there.name) == servers.NAME_BYTES_MAX + 1
    assert len(there.address) >= 2 + servers.UNIX_PATH_BYTES_MAX + 1
