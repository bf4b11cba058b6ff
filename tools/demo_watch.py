"""What can be seen of a running job from outside: its memory in /proc, its live counters.

Only looks: the control segment is mapped read-only, through the supervisor's descriptor of it in
/proc.  Where that can't be had (another user's job, a supervisor that has just gone), the counters
are simply not known, and the caller shows the memory alone.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL_LINK = "farmem-control"


@dataclass(frozen=True)
class Counters:
    """Pages out and in, summed over the processes that live now."""

    evicted: int
    fetched: int


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 when it has gone."""
    try:
        return parse_anonymous(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0


def parse_anonymous(status: str) -> int:
    """RssAnon from the text of /proc/PID/status, in bytes; 0 for a process without memory."""
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def find_control(stats_path: Path) -> str | None:
    """The way to the job's control segment: its supervisor kept our command line, stats path
    and all, and holds the descriptor."""
    marker = os.fsencode(stats_path)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if marker not in (process / "cmdline").read_bytes():
                continue
            for descriptor in (process / "fd").iterdir():
                if CONTROL_LINK in os.readlink(descriptor):
                    return str(descriptor)
        except OSError:
            continue
    return None


class LiveCounters:
    """The counters of a running job, from its control segment; None until it can be read."""

    def __init__(self, stats_path: Path) -> None:
        self._stats_path = stats_path
        self._control: Any = None
        self._map: mmap.mmap | None = None

    def _open(self) -> bool:
        from farmem import _native

        path = find_control(self._stats_path)
        if path is None:
            return False
        size_bytes = _native.ffi.sizeof("struct fm_control")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            self._map = mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError):
            return False
        finally:
            os.close(descriptor)
        control = _native.ffi.cast("struct fm_control *", _native.ffi.from_buffer(self._map))
        fits = control.magic == _native.lib.FM_CONTROL_MAGIC
        self._control = (
            control if fits and control.version == _native.lib.FM_CONTROL_VERSION else None
        )
        return self._control is not None

    def read(self) -> Counters | None:
        """The counters now, if they can be read."""
        if self._control is None and not self._open():
            return None
        control = self._control
        evicted = fetched = 0
        for slot in range(64):  # a demo has few processes; the ledger has many slots
            counters = control.procs[slot].counters
            evicted += counters.pages_evicted
            fetched += counters.pages_fetched
        return Counters(evicted, fetched)
