"""farmem on Linux 6.1 (Debian 12's), where there is no UFFDIO_MOVE, no POISON, no PAGEMAP_SCAN.

Every page leaves there by the copy path. A guest is booted once, in software emulation
(tools/guest.sh), and runs the batch of cases.py; each case is judged here by itself. The
programs check their own bytes, and the counters must show that pages went out and came back.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.guest.cases import LOST, REFUSED, SAFETY, WORDS_PERCENT, Case, compile_all
from tests.harness import ROOT, Result, assert_ok, assert_paged

pytestmark = [pytest.mark.safety, pytest.mark.guest]

GUEST = ROOT / "tools" / "guest.sh"
SUITE = "bookworm"
SETUP_SECONDS = 300
BATCH_SECONDS = 1500  # only to end a hang: it takes a few minutes
PAGE_BYTES = 4096
# What a kernel says of itself when something is wrong with it.
KERNEL_COMPLAINS = re.compile(r"kernel BUG|BUG:|WARNING:|Oops|general protection fault")


@dataclass
class Batch:
    """What the guest gave: a line per case, and the kernel's log."""

    found: dict[str, dict[str, Any]]
    end: str
    log: str

    def take(self, name: str) -> dict[str, Any]:
        assert name in self.found, f"the guest gave no result for {name}\n{self.end}"
        found = self.found[name]
        if "skipped" in found:
            pytest.skip(found["skipped"])
        return found

    def result(self, name: str) -> Result:
        found = self.take(name)
        return Result(
            found["returncode"],
            found["stdout"].encode(),
            found["stderr"].encode(),
            found["stats"],
            found["timed_out"],
        )


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Boot the guest and run everything in it, once."""
    ready = subprocess.run(
        [GUEST, "--setup", "--suite", SUITE],
        capture_output=True,
        text=True,
        check=False,
        timeout=SETUP_SECONDS,
    )
    if ready.returncode != 0:
        pytest.skip(f"no guest can be had: {ready.stderr.strip()}")
    compile_all()
    log = tmp_path_factory.mktemp("guest") / "kernel.log"
    words = ["--suite", SUITE, "--timeout", str(BATCH_SECONDS), "--log", str(log)]
    python = ROOT / ".venv" / "bin" / "python"
    run = subprocess.run(
        [GUEST, *words, "--", python, "-m", "tests.guest.batch"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    end = f"the guest ended with {run.returncode}\n{run.stderr[-4000:]}"
    return Batch({line["name"]: line for line in lines}, end, _text_of(log))


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def assert_copied(result: Result, evicted_pages: int, fetched_pages: int) -> None:
    """The copy path did it, and nothing else."""
    assert_paged(result.stats, evicted_pages, fetched_pages)
    assert result.stats is not None
    assert result.stats["pages_copied_out"] == result.stats["pages_evicted"], result.stats
    assert result.stats["pages_moved_out"] == 0, result.stats
    assert result.stats["pages_lost"] == 0, result.stats


def test_it_is_that_kernel(batch: Batch) -> None:
    assert batch.take("kernel")["release"].startswith("6.1."), batch.found["kernel"]


def test_refused_unless_nothing_is_pinned(batch: Batch) -> None:
    """One sentence with what was wrong, one with what to type instead."""
    result = batch.result(REFUSED.name)
    assert result.returncode == 125, result.describe()
    first, second = result.stderr.decode().strip().splitlines()
    assert "no UFFDIO_MOVE" in first and "6.1." in first, result.describe()
    assert "--no-pinned-io" in second, result.describe()


@pytest.mark.parametrize("case", SAFETY, ids=lambda case: case.name)
def test_right_bytes(batch: Batch, case: Case) -> None:
    result = batch.result(case.name)
    assert_ok(result)
    assert_copied(result, 1000, 500)
    assert result.stats is not None
    if case.command.startswith("forks"):
        assert result.stats["forks"] >= 1, result.stats
    if case.filters:
        assert result.stats["store_errors"] >= 1, result.stats


@pytest.mark.parametrize("percent", WORDS_PERCENT)
def test_same_result(batch: Batch, percent: int) -> None:
    """tests/survive/words.c at a part of its own peak of memory."""
    found = batch.take(f"words_{percent}")
    result = batch.result(f"words_{percent}")
    assert result.returncode == 0 and not result.timed_out, result.describe()
    assert found["stdout"] == found["plain_stdout"], result.describe()
    must_leave = (found["plain_peak_bytes"] - found["budget_bytes"]) // PAGE_BYTES // 2
    assert_copied(result, must_leave, 500)


def test_a_lost_page_ends_the_program(batch: Batch) -> None:
    """Before Linux 6.6 a page can't be poisoned: who touches one that is lost is ended, and
    told its address. A wrong byte would be told by the program itself."""
    result = batch.result(LOST.name)
    assert result.returncode == -9, result.describe()
    text = result.stderr.decode()
    told = re.search(r"was touched, .* ends the program; address (0x[0-9a-f]+)", text)
    assert told, result.describe()
    assert re.search(rf"page lost: .* address {told[1]}\b", text), result.describe()
    assert "wrong byte" not in text, result.describe()
    assert result.stats is not None and result.stats["pages_lost"] >= 1, result.describe()


def test_the_kernel_has_nothing_to_complain_of(batch: Batch) -> None:
    assert "guest: the command starts" in batch.log, f"there is no log\n{batch.end}"
    assert [line for line in batch.log.splitlines() if KERNEL_COMPLAINS.search(line)] == []
