"""A guest for tests (tools/guest.sh): is there one, what did its batch give, is its kernel well?

A batch is a program that prints a line of JSON, with a `name`, as each of its cases ends.  The
guest is booted once for all of them; what they gave is judged on the host, each by itself.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, Result

SUITE = "bookworm"  # Linux 6.1
SETUP_SECONDS = 300
BATCH_SECONDS = 1500  # only to end a hang: it takes a few minutes
# What a kernel says of itself when something is wrong with it.
KERNEL_COMPLAINS = re.compile(r"kernel BUG|BUG:|WARNING:|Oops|general protection fault")


@dataclass
class Batch:
    """What the guest gave: a line per case, and the kernel's log."""

    found: dict[str, dict[str, Any]]
    end: str
    log: Path

    def take(self, name: str) -> dict[str, Any]:
        assert name in self.found, f"the guest gave no result for {name}\n{self.end}"
        found = self.found[name]
        if "skipped" in found:
            pytest.skip(found["skipped"])
        assert "failed" not in found, found["failed"]
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


def _words(*options: str) -> list[str]:
    return [str(ROOT / "tools" / "guest.sh"), "--suite", SUITE, *options]


def set_up(*options: str) -> None:
    """Have a guest's kernel, and what the options need; or skip."""
    ready = subprocess.run(
        _words("--setup", *options),
        capture_output=True,
        text=True,
        check=False,
        timeout=SETUP_SECONDS,
    )
    if ready.returncode != 0:
        pytest.skip(f"no guest can be had: {ready.stderr.strip()}")


def start(module: str, log: Path, seconds: int, options: Sequence[str]) -> subprocess.Popen[str]:
    """Boot one that runs a module of the tests."""
    words = _words(*options, "--timeout", str(seconds), "--log", str(log))
    return subprocess.Popen(
        [*words, "--", str(ROOT / ".venv" / "bin" / "python"), "-m", module],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def run_batch(module: str, log: Path, *options: str) -> Batch:
    guest = start(module, log, BATCH_SECONDS, options)
    out, err = guest.communicate()
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    end = f"the guest ended with {guest.returncode}\n{err[-4000:]}"
    return Batch({line["name"]: line for line in lines}, end, log)


def assert_kernel_content(log: Path) -> None:
    """The kernel has nothing to complain of."""
    text = log.read_text(errors="replace") if log.exists() else ""
    assert "guest: the command starts" in text, "there is no log"
    assert [line for line in text.splitlines() if KERNEL_COMPLAINS.search(line)] == []
