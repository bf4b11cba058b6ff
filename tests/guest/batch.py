"""Runs in the guest: every case in turn, one JSON object per line as each ends.

Judges nothing: the host does (test_linux_6_1.py).  Names of cases as arguments choose some.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.guest.cases import (
    LOCAL,
    LOST,
    REFUSED,
    SAFETY,
    VOUCHED,
    WORDS_MIB,
    WORDS_PERCENT,
    Case,
    words_program,
)

# Until the supervisor is there nobody can adopt, and here it takes seconds to start: a short
# program would be over before.  Its name is what it gives itself once it serves.
ONCE_SUPERVISED = (
    "sh",
    "-c",
    'until grep -qs farmem-job /proc/[0-9]*/comm; do sleep 0.1; done; exec "$@"',
    "sh",
)


def tell(name: str, run: Callable[[], dict[str, Any]]) -> None:
    begin = time.monotonic()
    try:
        found = run()
    except pytest.skip.Exception as skipped:
        found = {"skipped": str(skipped)}
    found |= {"name": name, "seconds": round(time.monotonic() - begin, 1)}
    print(json.dumps(found), flush=True)


def as_json(result: harness.Result) -> dict[str, Any]:
    return {
        "returncode": result.returncode,
        "stdout": result.stdout.decode(errors="replace"),
        "stderr": result.stderr.decode(errors="replace"),
        "stats": result.stats,
        "timed_out": result.timed_out,
    }


def run_case(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="farmem-test-") as folder:
        armed = str(Path(folder) / "armed")
        arguments = case.command.format(armed=armed).split()[1:]
        result = harness.run_farmem(
            [*ONCE_SUPERVISED, case.program(), *arguments],
            local=LOCAL,
            options=case.options,
            filters=[item.format(armed=armed) for item in case.filters],
            timeout=case.timeout,
            check=False,
        )
    return as_json(result)


def run_words(percent: int, command: list[str], plain: harness.PlainResult) -> dict[str, Any]:
    budget = plain.peak_rss_bytes * percent // 100
    result = harness.run_farmem(
        [*ONCE_SUPERVISED, *command], local=str(budget), options=VOUCHED, timeout=200, check=False
    )
    return {
        **as_json(result),
        "plain_stdout": plain.stdout.decode(),
        "plain_peak_bytes": plain.peak_rss_bytes,
        "budget_bytes": budget,
    }


def main(names: list[str]) -> None:
    tell("kernel", lambda: {"release": os.uname().release})
    for case in (REFUSED, *SAFETY, LOST):
        if not names or case.name in names:
            tell(case.name, lambda case=case: run_case(case))  # type: ignore[misc]
    if not names or "words" in names:
        command = [str(words_program()), str(WORDS_MIB), "2", "3"]
        plain = harness.run_plain(command, timeout=100)
        for percent in WORDS_PERCENT:
            tell(f"words_{percent}", lambda percent=percent: run_words(percent, command, plain))  # type: ignore[misc]


main(sys.argv[1:])
