"""`farmem serve` and `farmem run --pool rdma://` on a kernel's RDMA: in a guest with Soft-RoCE.

One boot (tools/guest.sh) runs the batch of batch.py; each case is shown here by itself.  A second
one, of two guests that are joined by a wire, runs wire.py.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.guest.booted import Batch, assert_kernel_content, run_batch, set_up, start
from tests.harness import ROOT
from tests.rdma import programs

pytestmark = [pytest.mark.pools, pytest.mark.guest, pytest.mark.safety]

WIRE_SECONDS = 600  # only to end a hang
ON_A_WIRE = ("--rdma", "--cpus", "1", "--memory", "1G", "--link")
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
    set_up("--rdma")
    pyverbs = ROOT / "build/guest/rdma/usr/lib/python3/dist-packages/pyverbs"
    if not list(pyverbs.glob(f"device.{sys.implementation.cache_tag}-*.so")):
        pytest.skip(f"the distribution's pyverbs is for another Python: {os.listdir(pyverbs)[:3]}")
    programs.make_all()
    log = tmp_path_factory.mktemp("guest") / "kernel.log"
    return run_batch("tests.rdma.batch", log, "--rdma")


def test_the_device_is_what_the_unit_allows(batch: Batch) -> None:
    driver = batch.take("kernel")["driver"]
    unit = (ROOT / "systemd" / "farmem-server.service").read_text()
    assert f"DeviceAllow=char-{driver} rw\n" in unit


@pytest.mark.parametrize("name", CASES)
def test_rdma(batch: Batch, name: str) -> None:
    batch.take(name)


def test_the_server_does_nothing_per_page(batch: Batch) -> None:
    """One-sided: packets for each page, and the server's processes sleep as if there were none."""
    found = batch.take("the_server_does_nothing_per_page")
    assert found["moving"]["packets"] >= 2 * found["pages"], found
    assert found["moving"]["switches"] - found["idle"]["switches"] < found["pages"] // 10, found
    assert found["requests"] == 0, found


def test_forked_children(batch: Batch) -> None:
    """Under `farmem run`; each with a queue pair of its own."""
    batch.take("forked_children")


def test_a_real_program_at_a_quarter_of_its_memory(batch: Batch) -> None:
    """sed: the right output, and its pages moved by the device alone (run.py has looked)."""
    assert batch.take("sed_at_a_quarter")["digest"] == programs.sed_digest()


def test_two_hosts_over_a_wire(batch: Batch, tmp_path: Path) -> None:
    """A server in one guest; in the other a client of the test's own, then a program under
    `farmem run`: what is written here is there."""
    batch.take("kernel")
    with tempfile.TemporaryDirectory(prefix="farmem-wire-") as wire:
        logs = [tmp_path / f"log{rank}" for rank in (0, 1)]
        guests = [
            start("tests.rdma.wire", log, WIRE_SECONDS, [*ON_A_WIRE, f"{wire}:{rank}"])
            for rank, log in enumerate(logs)
        ]
        said = [guest.communicate() for guest in guests]
    ends = [(guest.returncode, *words) for guest, words in zip(guests, said, strict=True)]
    # On one line: who reads a log that keeps no more sees what both have said.
    assert all(status == 0 and "all is well" in out for status, out, _ in ends), repr(ends)
    for log in logs:
        assert_kernel_content(log)


def test_every_case_is_looked_at(batch: Batch) -> None:
    alone = {"kernel", "the_server_does_nothing_per_page", "everything"}
    assert set(batch.found) == {*CASES, *alone, "forked_children", "sed_at_a_quarter"}, batch.end


def test_the_kernel_has_nothing_to_complain_of(batch: Batch) -> None:
    assert_kernel_content(batch.log)
