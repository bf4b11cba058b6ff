"""`farmem serve` with real verbs: a kernel's RDMA, in a guest with a Soft-RoCE device.

One boot (tools/guest.sh) runs the batch of batch.py, whose client shares nothing with farmem but
the protocol; each case is shown here by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.guest.test_linux_6_1 import GUEST, KERNEL_COMPLAINS, SETUP_SECONDS, Batch, _text_of
from tests.harness import ROOT

pytestmark = [pytest.mark.pools, pytest.mark.guest, pytest.mark.safety]

SUITE = "bookworm"
BATCH_SECONDS = 1500  # only to end a hang: it takes a few minutes
WIRE_SECONDS = 600
PYTHON = ROOT / ".venv" / "bin" / "python"
CASES = [
    "numbers_of_the_verbs",
    "doctor_tells",
    "refusals_at_the_start",
    "self_test",
    "write_and_read",
    "nbd_and_rdma_see_one_memory",
    "other_tenants_are_out_of_reach",
    "tokens_count",
    "a_queue_pair_that_was_taken_away",
    "peers_that_are_not_there",
    "a_lease_that_ended",
    "writes_under_way_when_a_lease_ends",
    "huge_pages",
    "a_registration_that_is_kept_is_found",
    "a_server_that_is_killed",
]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    ready = subprocess.run(
        [GUEST, "--setup", "--rdma", "--suite", SUITE],
        capture_output=True,
        text=True,
        check=False,
        timeout=SETUP_SECONDS,
    )
    if ready.returncode != 0:
        pytest.skip(f"no guest can be had: {ready.stderr.strip()}")
    pyverbs = ROOT / "build/guest/rdma/usr/lib/python3/dist-packages/pyverbs"
    if not list(pyverbs.glob(f"device.{sys.implementation.cache_tag}-*.so")):
        pytest.skip(f"the distribution's pyverbs is for another Python: {os.listdir(pyverbs)[:3]}")
    log = tmp_path_factory.mktemp("guest") / "kernel.log"
    words = ["--suite", SUITE, "--rdma", "--timeout", str(BATCH_SECONDS), "--log", str(log)]
    run = subprocess.run(
        [GUEST, *words, "--", PYTHON, "-m", "tests.rdma.batch"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    end = f"the guest ended with {run.returncode}\n{run.stderr[-4000:]}"
    return Batch({line["name"]: line for line in lines}, end, _text_of(Path(log)))


def passed(batch: Batch, name: str) -> dict[str, Any]:
    found = batch.take(name)
    assert "failed" not in found, found["failed"]
    return found


def test_the_device_is_what_the_unit_allows(batch: Batch) -> None:
    driver = passed(batch, "kernel")["driver"]
    unit = (ROOT / "systemd" / "farmem-server.service").read_text()
    assert f"DeviceAllow=char-{driver} rw\n" in unit


@pytest.mark.parametrize("name", CASES)
def test_rdma(batch: Batch, name: str) -> None:
    passed(batch, name)


def test_the_server_does_nothing_per_page(batch: Batch) -> None:
    """One-sided: packets for each page, and the server's processes sleep as if there were none."""
    found = passed(batch, "the_server_does_nothing_per_page")
    assert found["moving"]["packets"] >= 2 * found["pages"], found
    assert found["moving"]["switches"] - found["idle"]["switches"] < found["pages"] // 10, found
    assert found["requests"] == 0, found


def test_two_hosts_over_a_wire(batch: Batch, tmp_path: Path) -> None:
    """Server and client each in a guest of its own: what is written here is there."""
    passed(batch, "kernel")
    with tempfile.TemporaryDirectory(prefix="farmem-wire-") as wire:
        guests = [started(f"{wire}:{rank}", tmp_path / f"log{rank}") for rank in (0, 1)]
        said = [guest.communicate() for guest in guests]
    ends = [(guest.returncode, *words) for guest, words in zip(guests, said, strict=True)]
    # On one line: who reads a log that keeps no more sees what both have said.
    assert all(status == 0 and "all is well" in out for status, out, _ in ends), repr(ends)
    for rank in (0, 1):
        log = (tmp_path / f"log{rank}").read_text(errors="replace")
        assert [line for line in log.splitlines() if KERNEL_COMPLAINS.search(line)] == []


def started(link: str, log: Path) -> subprocess.Popen[str]:
    words = ["--suite", SUITE, "--rdma", "--link", link, "--cpus", "1", "--memory", "1G"]
    words += ["--timeout", str(WIRE_SECONDS), "--log", str(log)]
    return subprocess.Popen(
        [GUEST, *words, "--", PYTHON, "-m", "tests.rdma.wire"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_every_case_is_looked_at(batch: Batch) -> None:
    seen = {*CASES, "kernel", "the_server_does_nothing_per_page", "everything"}
    assert set(batch.found) == seen, batch.end


def test_the_kernel_has_nothing_to_complain_of(batch: Batch) -> None:
    assert "guest: the command starts" in batch.log, f"there is no log\n{batch.end}"
    assert [line for line in batch.log.splitlines() if KERNEL_COMPLAINS.search(line)] == []
