"""Running a script that uses regions, by itself or as another user."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness import as_user

ROOT = Path(__file__).resolve().parents[2]
PYTHON = str(ROOT / ".venv" / "bin" / "python")
LIMIT_SECONDS = 240
PROLOGUE = """
import errno, gc, mmap, multiprocessing, os, re, random, signal, subprocess, sys, threading, time
import numpy as np
import farmem
from tests.regions.inside import *
"""


def program(script: str) -> list[str]:
    """The command that runs a script."""
    code = PROLOGUE + textwrap.dedent(script)
    return [PYTHON if Path(PYTHON).exists() else sys.executable, "-c", code]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **(extra or {})}


def run(
    script: str,
    *,
    env: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
    check: bool = True,
) -> "subprocess.CompletedProcess[str]":
    """Run a script to its end; with check, it must end well."""
    done = subprocess.run(
        [*wrapper, *program(script)],
        env=environment(env),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=LIMIT_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    if check:
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def nobody() -> list[str]:
    """Words before a command that make it an ordinary user's, without any privilege."""
    return as_user("nobody", [])
