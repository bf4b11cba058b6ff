"""The C tests, built under ASan and UBSan: one pytest test per program."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from tests.native_build import build_native

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "native" / "tests").glob("test_*.c"))
LIMIT_SECONDS = 900
# A program whose subject is not to be had here ends with this, and says what is missing.
EXIT_UNSUPPORTED = 77


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the built programs."""
    return build_native("native_tests") / "asan"


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=LIMIT_SECONDS,
        env=environment,
    )
    if done.returncode == EXIT_UNSUPPORTED:
        pytest.skip(done.stdout.strip())
    return done


@pytest.mark.parametrize("program", PROGRAMS)
def test_native(programs: Path, program: str) -> None:
    if not (programs / program).exists():
        pytest.skip("its headers are not installed: tools/setup.sh build")
    done = run([programs / program])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


@pytest.mark.skipif(kernel() < (6, 18), reason="UFFDIO_MOVE counts rightly before Linux 6.18")
def test_moves_notice_what_is_not_counted(programs: Path) -> None:
    done = run([programs / "test_moves", "believe_move"])
    assert done.returncode == 1, done.stdout[-5000:] + done.stderr[-5000:]
    assert "WRONG" in done.stdout


def test_there_are_native_tests() -> None:
    assert PROGRAMS
