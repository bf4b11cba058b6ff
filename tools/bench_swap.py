"""Kernel swap to measure against: a zram or a RAM-backed loop device, and a memory cgroup.

Everything made here is undone by the context managers, also when a benchmark fails or is told to
stop: swap is switched off, devices are given back, cgroups and mounts removed.  A machine's own
swap and its own zram devices are never touched: a device is always a new one.  What is not to be
had is said by raising Unavailable with a sentence that names it.

Memory cgroups of version 1 and of version 2 will do; version 1 is taken where it has the memory
controller, because then version 2 has not.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
ZRAM_CONTROL = Path("/sys/class/zram-control")
CGROUPS = Path("/sys/fs/cgroup")
TRIES_MAX = 50
TRY_SECONDS = 0.1


class Unavailable(Exception):
    """Something that this machine does not offer; the text says what, in a sentence."""


def run_tool(*command: str) -> str:
    """Run a system tool, out of reach of the terminal's Ctrl-C; its failure is an Unavailable."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            start_new_session=True,
        )
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


@dataclass(frozen=True)
class ZramUse:
    """What a zram device holds: bytes that were given to it, and what they take in memory."""

    given_bytes: int = 0
    taken_bytes: int = 0


def parse_mm_stat(text: str) -> ZramUse:
    """The first and the third number of /sys/block/zramN/mm_stat."""
    words = text.split()
    return ZramUse(int(words[0]), int(words[2]))


def zram_use(device: str) -> ZramUse:
    return parse_mm_stat(Path("/sys/block", Path(device).name, "mm_stat").read_text())


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


def other_swap() -> list[str]:
    """The swap devices that are on already: they would take part in what is measured."""
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    return [line.split()[0] for line in lines]


@contextlib.contextmanager
def swap_on(device: str) -> Iterator[None]:
    if others := other_swap():
        raise Unavailable(f"swap is on already ({', '.join(others)}): switch it off first")
    run_tool("swapon", "--priority", "100", device)
    try:
        yield
    finally:
        run_tool("swapoff", device)


@dataclass(frozen=True)
class SwapCount:
    """Pages that the kernel has swapped out and in since it started."""

    out: int
    into: int

    def since(self, earlier: SwapCount) -> SwapCount:
        return SwapCount(self.out - earlier.out, self.into - earlier.into)


def parse_vmstat(text: str) -> SwapCount:
    """From /proc/vmstat; pages of zeros are counted apart there, where the kernel knows them."""
    values = dict(line.split() for line in text.splitlines())
    out = int(values["pswpout"]) + int(values.get("swpout_zero", 0))
    return SwapCount(out, int(values["pswpin"]) + int(values.get("swpin_zero", 0)))


def swap_count() -> SwapCount:
    return parse_vmstat(Path("/proc/vmstat").read_text())


@dataclass(frozen=True)
class GroupFiles:
    """What the two versions of memory cgroups call the same things."""

    version: int
    parent: Path
    limit: str
    peak: str
    deaths: str


def group_files(cgroups: Path = CGROUPS) -> GroupFiles:
    """The version of memory cgroups that this machine has."""
    first = cgroups / "memory"
    if (first / "memory.limit_in_bytes").exists():
        peak = "memory.max_usage_in_bytes"
        return GroupFiles(1, first, "memory.limit_in_bytes", peak, "memory.oom_control")
    controllers = cgroups / "cgroup.controllers"
    if controllers.exists() and "memory" in controllers.read_text().split():
        return GroupFiles(2, cgroups, "memory.max", "memory.peak", "memory.events")
    raise Unavailable(f"no memory cgroup, of version 1 or 2, is mounted below {cgroups}")


@contextlib.contextmanager
def memory_for_children(files: GroupFiles) -> Iterator[None]:
    """Version 2 has the memory controller in a group only if its parent hands it down."""
    control = files.parent / "cgroup.subtree_control"
    if files.version == 1 or "memory" in control.read_text().split():
        yield
        return
    try:
        control.write_text("+memory")
    except OSError as error:
        raise Unavailable(f"cannot write +memory to {control}: {error.strerror}") from error
    try:
        yield
    finally:
        keep_trying(control, "-memory")


class MemoryGroup:
    """A memory cgroup whose members together may hold `limit_bytes`, and swap the rest."""

    def __init__(self, path: Path, files: GroupFiles) -> None:
        self.path = path
        self._files = files

    def wrap(self, command: list[str]) -> list[str]:
        """The same command, entering the group first: a shell writes its own pid, then execs."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", enter, str(self.path / "cgroup.procs"), *command]

    def flush(self) -> None:
        """Make the kernel bring the group's counters up to date."""
        (self.path / "memory.stat").read_bytes()

    def peak_bytes(self) -> int:
        """The most that the group ever held; 0 where the kernel does not tell (before 5.19)."""
        path = self.path / self._files.peak
        return int(path.read_text()) if path.exists() else 0

    def killed(self) -> int:
        """How many of its members the kernel killed because memory could not be had."""
        return parse_killed((self.path / self._files.deaths).read_text())


def parse_killed(text: str) -> int:
    """The number behind oom_kill, in memory.oom_control (version 1) or memory.events."""
    values = dict(line.split() for line in text.splitlines())
    return int(values.get("oom_kill", 0))


def remove_group(path: Path) -> None:
    for _ in range(TRIES_MAX):
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(TRY_SECONDS)
    raise Unavailable(f"the cgroup {path} stays busy: remove it with rmdir")


@contextlib.contextmanager
def memory_group(limit_bytes: int, cgroups: Path = CGROUPS) -> Iterator[MemoryGroup]:
    """A new group: what an earlier program left in memory must not be charged to this one."""
    need_root()
    files = group_files(cgroups)
    with memory_for_children(files):
        path = files.parent / f"farmem-bench-{os.getpid()}"
        path.mkdir()
        try:
            (path / files.limit).write_text(str(limit_bytes))
            yield MemoryGroup(path, files)
        finally:
            remove_group(path)
