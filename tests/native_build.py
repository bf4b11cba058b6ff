"""Builds the C tests and the simulator for the tests that run them.

They are built apart from the package, in build/native, as `make native` does it.
"""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "native"
BUILD_SECONDS = 900


def build_native(target: str) -> Path:
    """Build a CMake target; the folder of the build."""
    path = f"{ROOT}/.venv/bin:{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    assert cmake, "cmake is missing: run tools/setup.sh build"
    options = ["-DFARMEM_TESTS=ON", "-DFARMEM_PYTHON=OFF", "-DFARMEM_LIBRARY=OFF"]
    for command in (
        [cmake, "-S", ROOT, "-B", BUILD, *options],
        [cmake, "--build", BUILD, "--target", target, "-j", "2"],
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
    return BUILD
