"""The C tests, built under ASan and UBSan: one pytest test per program."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.native_build import build_native

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "native" / "tests").glob("test_*.c"))
LIMIT_SECONDS = 900


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the built programs."""
    return build_native("native_tests") / "asan"


@pytest.mark.parametrize("program", PROGRAMS)
def test_native(programs: Path, program: str) -> None:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [programs / program],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=LIMIT_SECONDS,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def test_there_are_native_tests() -> None:
    assert PROGRAMS
