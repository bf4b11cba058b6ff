"""Where `make bench` runs a program: by itself, under farmem, or in a cgroup that swaps.

A place wraps a command, and says afterwards what its counters tell.  A run in which memory was
short and nothing was paged would measure something else than it claims: such a run fails.  No
place knows what the programs do.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench_run import Failed, pause
from bench_swap import (
    MIB,
    MemoryGroup,
    Unavailable,
    ZramUse,
    group_files,
    loop_device,
    memory_group,
    other_swap,
    swap_count,
    swap_on,
    zram_device,
    zram_use,
)

LOCAL, FARMEM, ZRAM, LOOP = "everything local", "farmem", "zram", "loop"
TITLES = {
    LOCAL: "everything local",
    FARMEM: "`farmem run`, pool `mem:`",
    ZRAM: "kernel swap to zram, lz4",
    LOOP: "kernel swap to a RAM-backed loop device",
}
FARMEM_LOCAL_BYTES_MIN = 16 * MIB
OVER_BUDGET_BYTES_MAX = 16 * MIB
PAGE_BYTES = 4096
STATS_SECONDS_MAX = 15.0
# Less than this is not worth calling short: libraries and page tables weigh more.
SHORT_PAGES_MIN = 1024
FLUSH_SECONDS = 0.005
FLUSHES_PER_LOOK = 50


@dataclass(frozen=True)
class Counts:
    """What a place counted: pages out and in, the most that was local, how zram packed it."""

    pages_out: int = 0
    pages_in: int = 0
    peak_local_bytes: int = 0
    zram: ZramUse = field(default_factory=ZramUse)
    note: str = ""

    def must_have_paged(self, short_pages: int) -> None:
        """Half of what does not fit must have left, and a good part of it must have come back."""
        if short_pages < SHORT_PAGES_MIN:
            return
        if self.pages_out < short_pages // 2 or self.pages_in < short_pages // 10:
            raise Failed(
                f"{short_pages} pages did not fit, but only {self.pages_out} were paged out "
                f"and {self.pages_in} in: not a measurement of paging{self.note}"
            )


class Place:
    """Everything local: the program as it is."""

    look_every_s = 0.0
    said = ""  # on stderr, by the program that ran last

    def wrap(self, command: list[str]) -> list[str]:
        return command

    def look(self, pid: int) -> None:
        """Called now and then while the program runs, at least every look_every_s if not 0."""

    def finish(self) -> Counts:
        """What was counted; called when the program has ended."""
        return Counts()


class Calibration(Place):
    """Everything local, and the peak of the program's anonymous memory sampled from outside."""

    look_every_s = 0.002

    def __init__(self) -> None:
        self.peak_bytes = 0

    def look(self, pid: int) -> None:
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes(pid))


def anonymous_bytes(pid: int) -> int:
    """RssAnon: what a budget of farmem's is for. 0 when the process has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0]) * 1024 if lines else 0


class FarmemPlace(Place):
    """Under `farmem run`; the counters are its --stats file."""

    def __init__(self, farmem: Path, local_bytes: int, folder: Path) -> None:
        self._farmem = farmem
        self._local_bytes = local_bytes
        self._stats = folder / "stats.json"

    def wrap(self, command: list[str]) -> list[str]:
        options = ["-q", "--local", str(self._local_bytes), "--stats", str(self._stats)]
        return [str(self._farmem), "run", *options, "--", *command]

    def finish(self) -> Counts:
        """The file comes when the supervisor ends, a moment after the program: so the next run
        has the machine to itself, too."""
        waited_s = 0.0
        while not self._stats.exists():
            if waited_s > STATS_SECONDS_MAX:
                raise Failed("farmem wrote no statistics")
            pause(0.01)
            waited_s += 0.01
        return read_farmem_stats(json.loads(self._stats.read_text()))


def read_farmem_stats(stats: dict[str, Any]) -> Counts:
    """The counters of a --stats file.

    A lost page or a failed store is a failed run; so is one that held more memory than it was
    given, because it would be compared with runs that could not.
    """
    for name in ("pages_lost", "store_errors"):
        if stats[name]:
            raise Failed(f"farmem counts {stats[name]} {name}")
    peak_bytes, budget_bytes = stats["peak_local_bytes"], stats["budget_bytes"]
    if peak_bytes > budget_bytes + OVER_BUDGET_BYTES_MAX:
        raise Failed(
            f"over budget: farmem held {peak_bytes // MIB} MiB of {budget_bytes // MIB} MiB"
        )
    note = f" ({stats['processes']} processes, {stats['processes_adopted']} taken over)"
    return Counts(stats["pages_evicted"], stats["pages_fetched"], peak_bytes, note=note)


@contextlib.contextmanager
def farmem_place(farmem: Path, local_bytes: int) -> Iterator[Place]:
    if local_bytes < FARMEM_LOCAL_BYTES_MIN:
        raise Unavailable(
            f"{local_bytes // MIB} MiB of local memory is less than farmem's minimum of 16 MiB"
        )
    with tempfile.TemporaryDirectory(prefix="farmem-bench-") as folder:
        yield FarmemPlace(farmem, local_bytes, Path(folder))


class SwapPlace(Place):
    """In a memory cgroup, with one swap device on; the counters are the kernel's."""

    def __init__(self, device: str, group: MemoryGroup) -> None:
        self._device = device
        self._group = group
        self._start = swap_count()
        self._zram = ZramUse()
        self._done = threading.Event()
        self._steward = threading.Thread(target=self._run, daemon=True)

    def wrap(self, command: list[str]) -> list[str]:
        return self._group.wrap(command)

    def finish(self) -> Counts:
        count = swap_count().since(self._start)
        return Counts(count.out, count.into, self._group.peak_bytes(), self._zram)

    def __enter__(self) -> SwapPlace:
        self._steward.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._steward.join()

    def _run(self) -> None:
        """Help the kernel a little: Linux 6.18 was seen to kill a group's programs for want of
        memory with most of the swap free, in half of redis' runs.  It reclaims by counters of the
        group that it brings up to date now and then only; reading memory.stat does it at once."""
        is_zram = Path(self._device).name.startswith("zram")
        turn = 0
        with contextlib.suppress(OSError):  # in time on a busy machine, too
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -20)
        while not self._done.wait(FLUSH_SECONDS):
            self._group.flush()
            turn += 1
            if is_zram and turn % FLUSHES_PER_LOOK == 0:
                self._zram = max(self._zram, zram_use(self._device), key=lambda u: u.given_bytes)


@contextlib.contextmanager
def swap_place(device: str, local_bytes: int) -> Iterator[Place]:
    with swap_on(device), memory_group(local_bytes) as group:
        try:
            with SwapPlace(device, group) as place:
                yield place
        except Failed as error:
            if group.killed():
                raise Failed("the kernel killed it: its cgroup was out of memory") from error
            raise


@dataclass
class Systems:
    """What can be measured here: how to make a place of each kind, and what is left out."""

    make: dict[str, Callable[[int], AbstractContextManager[Place]]]
    left_out: dict[str, str]


def prepare_systems(
    wanted: list[str], farmem: Path | None, swap_bytes: int, stack: contextlib.ExitStack
) -> Systems:
    """Make the devices that are wanted, for as long as the stack lives."""
    systems = Systems({LOCAL: lambda _local_bytes: contextlib.nullcontext(Place())}, {})
    if FARMEM in wanted:
        if farmem is None:
            systems.left_out[FARMEM] = "no farmem beside this Python or on the PATH: run `make`"
        else:
            systems.make[FARMEM] = partial(farmem_place, farmem)
    for name, device in ((ZRAM, zram_device), (LOOP, loop_device)):
        if name not in wanted:
            continue
        try:
            group_files()
            if others := other_swap():
                raise Unavailable(f"swap is on already ({', '.join(others)}): switch it off first")
            path = stack.enter_context(device(swap_bytes))
            systems.make[name] = partial(swap_place, path)
        except Unavailable as error:
            systems.left_out[name] = str(error)
    return systems
