"""A lending host and a borrowing one: two network namespaces and a wire, with TLS and without."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import assert_ok, assert_paged, compile_c, start_farmem
from tests.pools.certificates import make_certificates
from tests.pools.serving import UNIX, need, serving, until
from tests.pools.tls_run import tls_words

pytestmark = [pytest.mark.pools, pytest.mark.uffd, pytest.mark.root]
LIMIT_S = 90
LENDER, BORROWER = "10.77.0.1", "10.77.0.2"
PORT, DATA_PORT = 7717, 7718


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=LIMIT_S)


class Network:
    """Two namespaces of our own; the kernel takes the wire away with them."""

    def __init__(self) -> None:
        self.lender, self.borrower = (f"farmem-{os.getpid()}-{end}" for end in "ab")

    def make(self) -> None:
        for name in (self.lender, self.borrower):
            ip("netns", "add", name)
        ends = ["type", "veth", "peer", "name", "wire", "netns", self.borrower]
        ip("link", "add", "wire", "netns", self.lender, *ends)
        for name, address in ((self.lender, LENDER), (self.borrower, BORROWER)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            for device in ("wire", "lo"):
                ip("-n", name, "link", "set", device, "up")

    def remove(self) -> None:
        for name in (self.lender, self.borrower):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


def within(name: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", name)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    need("ip")
    made = Network()
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="farmem-tls-") as name:
        yield make_certificates(Path(name) / "ours", f"DNS:pool7,IP:{LENDER}")


def way_of(tls: bool, folder: Path) -> tuple[str, ...]:
    return tls_words(folder) if tls else ("--tls=off",)


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_every_word_over_a_wire(tls: bool, network: Network, folder: Path) -> None:
    words = (*way_of(tls, folder), "--data-port", str(DATA_PORT))
    listens = [f"{LENDER}:{PORT}"]
    with (
        serving(*words, capacity="256M", listens=listens, wrapper=within(network.lender)),
        start_farmem(
            [compile_c("verify"), "2", "96", "2"],
            local="24M",
            options=("--pool", f"tcp://{LENDER}:{PORT}", *way_of(tls, folder)),
            wrapper=within(network.borrower),
        ) as job,
    ):
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["pages_lost"] == 0


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_a_wire_that_is_cut_for_a_while(
    tls: bool, network: Network, folder: Path, tmp_path: Path
) -> None:
    words = (*way_of(tls, folder), "--data-port", str(DATA_PORT))
    listens = [f"{LENDER}:{PORT}"]
    with (
        serving(*words, capacity="256M", listens=listens, wrapper=within(network.lender)),
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")],
            local="32M",
            options=("--pool", f"tcp://{LENDER}:{PORT}", *way_of(tls, folder)),
            wrapper=within(network.borrower),
        ) as job,
    ):
        job.await_out("ready")
        ip("-n", network.lender, "link", "set", "wire", "down")
        try:
            job.await_err("does not answer")
        finally:
            ip("-n", network.lender, "link", "set", "wire", "up")
        job.await_err("answers again")
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert result.stats is not None and result.stats["pages_lost"] == 0


def test_a_wire_that_stays_cut(network: Network, folder: Path, tmp_path: Path) -> None:
    """The job ends, and the server has its memory back when the lease's time is over."""
    words = (*tls_words(folder), "--data-port", str(DATA_PORT), "--ttl", "2s")
    listens = [f"{LENDER}:{PORT}", "unix:{folder}/pool"]
    soon = ("--pool-timeout", "2s", "--pool", f"tcp://{LENDER}:{PORT}", *tls_words(folder))
    with serving(
        *words, capacity="256M", listens=listens, wrapper=within(network.lender)
    ) as server:
        with start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")],
            local="32M",
            options=soon,
            wrapper=within(network.borrower),
        ) as job:
            job.await_out("ready")
            ip("-n", network.lender, "link", "set", "wire", "down")
            try:
                result = job.finish(LIMIT_S)
            finally:
                ip("-n", network.lender, "link", "set", "wire", "up")
        assert result.returncode == -signal.SIGBUS, result.describe()
        assert f"{LENDER}:{PORT}".encode() in result.stderr, result.describe()
        until(lambda: server.ask("GET", "/v1/server", way=UNIX)[1]["leases"] == 0, "the lease")


def test_a_host_that_is_not_there(network: Network, folder: Path) -> None:
    """Nothing answers for that address: an error, soon, and not a job that waits."""
    with start_farmem(
        ["true"],
        local="32M",
        options=("--pool", "tcp://10.77.0.9:7717", *tls_words(folder)),
        wrapper=within(network.borrower),
    ) as job:
        result = job.finish(LIMIT_S, wait_stats_s=0)
    assert result.returncode == 125 and b"10.77.0.9:7717 can't be reached" in result.stderr


def test_off_host_needs_a_word(network: Network) -> None:
    with start_farmem(
        ["true"],
        local="32M",
        options=("--pool", f"tcp://{LENDER}:{PORT}"),
        wrapper=within(network.borrower),
    ) as job:
        result = job.finish(LIMIT_S, wait_stats_s=0)
    assert result.returncode == 125 and b"on another host" in result.stderr
