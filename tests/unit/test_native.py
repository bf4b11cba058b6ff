"""The C tests, built under ASan and UBSan: one pytest test per program."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native"
PROGRAMS = sorted(path.stem for path in (ROOT / "native" / "tests").glob("test_*.c"))
BUILD_SECONDS = 900
LIMIT_SECONDS = 900


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the built programs."""
    path = f"{ROOT}/.venv/bin:{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    assert cmake, "cmake is missing: run tools/setup.sh build"
    options = ["-DFARMEM_TESTS=ON", "-DFARMEM_PYTHON=OFF", "-DFARMEM_LIBRARY=OFF"]
    for command in (
        [cmake, "-S", ROOT, "-B", BUILD, *options],
        [cmake, "--build", BUILD, "--target", "native_tests", "-j", "2"],
    ):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=BUILD_SECONDS,
            env={"PATH": path},
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return BUILD / "asan"


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
