"""Kernel swap to measure against: a zram or a RAM-backed loop device, and a memory cgroup (v1).

Everything made here is undone by the context managers, also when a benchmark fails or is told to
stop: swap is switched off, devices are given back, cgroups and mounts removed.  A machine's own
swap and its own zram devices are never touched: a device is always a new one.  What is not to be
had is said by raising Unavailable with a sentence that names it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
ZRAM_CONTROL = Path("/sys/class/zram-control")
MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")
TRIES_MAX = 50
TRY_SECONDS = 0.1


class Unavailable(Exception):
    """Something that this machine does not offer; the text says what, in a sentence."""


def run_tool(*command: str) -> str:
    """Run a system tool; its failure is an Unavailable that quotes it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise Unavailable(f"the command {command[0]} is not installed") from error
    if done.returncode != 0:
        detail = done.stderr.strip() or f"exit status {done.returncode}"
        raise Unavailable(f"`{' '.join(command)}` failed: {detail}")
    return done.stdout.strip()


def need_root() -> None:
    if os.geteuid() != 0:
        raise Unavailable("kernel swap can only be set up by root: run `sudo make bench`")


def lz4_listed(comp_algorithm: str) -> bool:
    """Whether /sys/block/zramN/comp_algorithm ("[lzo-rle] lzo lz4") offers lz4."""
    return "lz4" in comp_algorithm.replace("[", " ").replace("]", " ").split()


def keep_trying(path: Path, value: str) -> None:
    """Write to a kernel file that can be busy for a moment after its last user has gone."""
    for _ in range(TRIES_MAX):
        try:
            path.write_text(value)
            return
        except OSError as error:
            last = error
        time.sleep(TRY_SECONDS)
    raise Unavailable(f"cannot write {value} to {path}: {last.strerror}")


@contextlib.contextmanager
def zram_device(size_bytes: int) -> Iterator[str]:
    """A new zram device with lz4, formatted as swap but not switched on."""
    need_root()
    if not (ZRAM_CONTROL / "hot_add").exists():
        raise Unavailable("zram is not in this kernel (no /sys/class/zram-control)")
    number = (ZRAM_CONTROL / "hot_add").read_text().strip()
    system = Path(f"/sys/block/zram{number}")
    try:
        if not lz4_listed((system / "comp_algorithm").read_text()):
            raise Unavailable("zram in this kernel has no lz4")
        (system / "comp_algorithm").write_text("lz4")
        (system / "disksize").write_text(str(size_bytes))
        run_tool("mkswap", f"/dev/zram{number}")
        yield f"/dev/zram{number}"
    finally:
        keep_trying(system / "reset", "1")
        keep_trying(ZRAM_CONTROL / "hot_remove", number)


def mount_ram(folder: str, size_bytes: int) -> None:
    """A tmpfs, if possible one that is itself never swapped (Linux 6.4 and later)."""
    options = f"size={size_bytes + 16 * MIB}"
    try:
        run_tool("mount", "-t", "tmpfs", "-o", f"{options},noswap", "farmem-bench", folder)
    except Unavailable:
        run_tool("mount", "-t", "tmpfs", "-o", options, "farmem-bench", folder)


@contextlib.contextmanager
def loop_device(size_bytes: int) -> Iterator[str]:
    """A loop device over a file in RAM, formatted as swap but not switched on.

    The file's pages are allocated here, by this process: left to be allocated by the swapping
    itself, they would be charged to the very cgroup that is short of memory.
    """
    need_root()
    with tempfile.TemporaryDirectory(prefix="farmem-bench-") as folder, contextlib.ExitStack() as s:
        mount_ram(folder, size_bytes)
        s.callback(run_tool, "umount", folder)
        image = Path(folder) / "swap"
        with open(image, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        image.chmod(0o600)
        device = run_tool("losetup", "--find", "--show", str(image))
        s.callback(run_tool, "losetup", "--detach", device)
        run_tool("mkswap", device)
        yield device


@contextlib.contextmanager
def swap_on(device: str) -> Iterator[None]:
    run_tool("swapon", "--priority", "100", device)
    try:
        yield
    finally:
        run_tool("swapoff", device)


class MemoryGroup:
    """A memory cgroup of version 1 whose members may hold `limit_bytes`, and swap the rest."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrap(self, command: list[str]) -> list[str]:
        """The same command, entering the group first: a shell writes its own pid, then execs."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", enter, str(self.path / "cgroup.procs"), *command]


def other_swap() -> list[str]:
    """The swap devices that are on already: they would take part in what is measured."""
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    return [line.split()[0] for line in lines]


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    need_root()
    if not (MEMORY_CGROUP / "memory.limit_in_bytes").exists():
        raise Unavailable(f"no memory cgroup of version 1 is mounted at {MEMORY_CGROUP}")
    path = MEMORY_CGROUP / f"farmem-bench-{os.getpid()}"
    path.mkdir()
    try:
        (path / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield MemoryGroup(path)
    finally:
        for _ in range(TRIES_MAX):
            try:
                path.rmdir()
                break
            except OSError:
                time.sleep(TRY_SECONDS)
        else:
            raise Unavailable(f"the cgroup {path} stays busy: remove it with rmdir")
