"""Each program of the safety tests by itself, without farmem.

A program that fails by itself proves nothing when it fails under farmem; so all of them
are run plain first, with the arguments of the real tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import assert_ok, compile_c, free_space_folder, run_plain

pytestmark = pytest.mark.safety

FOLDER = str(free_space_folder())
CASES = [
    "verify", f"uring_fixed {FOLDER}", f"direct_io {FOLDER}", "vm_writev", "discards dontneed",
    "discards free", "unmap_reuse", "remap grow", "remap move", "remap fixed", "remap dontunmap",
    "remap storm", "closefrom range early", "closefrom loop late", "closefrom dup2 late",
    "death_writes pipe exit 3", "death_writes socket kill 3", "forks child", "forks double",
    "forks grand", "forks many 40", "forks malloc", "forks thread", "spawns",
    "rawfork _Fork", "rawfork clone", "rawfork syscall-clone3", "rawfork inline",
    "thread_exit", "signals", "vmsplice pipe", "vmsplice zerocopy", "protect", "blocked_end exit",
    "blocked_end exec", "lost",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(FOLDER, "").strip())
def test_passes_by_itself(case: str, tmp_path: Path) -> None:
    name, *arguments = case.split()
    assert_ok(run_plain([compile_c(name), *arguments], cwd=tmp_path, timeout=60))
