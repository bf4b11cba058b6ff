"""The machine that `make bench` runs on: what it is, and how busy others kept it meanwhile.

Reads /proc alone.  A benchmark on a shared machine is worth what the report says of the noise: the
load before and after, the time that the hypervisor took away (steal), and how busy the processors
were in moments in which the benchmark itself did nothing.
"""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bench_run import pause

IDLE_LOOK_SECONDS = 0.4
LOAD_MAX = 0.5
STEAL_PERCENT_MAX = 1.0
OTHERS_PERCENT_MAX = 5.0


def read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def field_of(text: str, name: str) -> str:
    """The value of the first `name : value` line."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return "unknown"


def describe() -> dict[str, str]:
    """What the figures depend on, in words."""
    memory_kib = field_of(read("/proc/meminfo"), "MemTotal").split()[0]
    gib = f"{int(memory_kib) / (1 << 20):.1f} GiB" if memory_kib.isdigit() else "unknown"
    huge = read("/sys/kernel/mm/transparent_hugepage/enabled")
    cpuinfo = read("/proc/cpuinfo")
    virtual = "hypervisor" in field_of(cpuinfo, "flags").split()
    return {
        "processor": field_of(cpuinfo, "model name"),
        "processors": f"{os.cpu_count()}{', virtual' if virtual else ''}",
        "memory": gib,
        "kernel": f"Linux {platform.release()}",
        "swap read-ahead": f"vm.page-cluster = {read('/proc/sys/vm/page-cluster')}",
        "swappiness": read("/proc/sys/vm/swappiness"),
        "huge pages": huge[huge.find("[") + 1 : huge.find("]")] if "[" in huge else huge,
        "Python": platform.python_version(),
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def available_bytes() -> int:
    """Memory that could be had now; 0 where the kernel does not tell."""
    words = field_of(read("/proc/meminfo"), "MemAvailable").split()
    return int(words[0]) * 1024 if words[0].isdigit() else 0


@dataclass(frozen=True)
class Processors:
    """Time of all processors together, in ticks: all of it, idle, taken by the hypervisor."""

    total: int
    idle: int
    steal: int

    def since(self, earlier: Processors) -> Processors:
        return Processors(
            self.total - earlier.total, self.idle - earlier.idle, self.steal - earlier.steal
        )

    def busy_percent(self) -> float:
        return 100 * (self.total - self.idle) / self.total if self.total else 0.0

    def steal_percent(self) -> float:
        return 100 * self.steal / self.total if self.total else 0.0


def parse_stat(text: str) -> Processors:
    """From the first line of /proc/stat; guests' time is part of user time there already."""
    ticks = [int(word) for word in text.splitlines()[0].split()[1:9]]
    return Processors(sum(ticks), ticks[3] + ticks[4], ticks[7])


def processors() -> Processors:
    return parse_stat(read("/proc/stat"))


@dataclass
class Noise:
    """How busy the machine was with what is not ours."""

    load_before: float
    load_after: float = 0.0
    steal_percent: float = 0.0
    others_percent: list[float] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """Why the figures should not be trusted too far; empty on a quiet machine."""
        found = []
        if self.load_before > LOAD_MAX:
            found.append(
                f"the load average was {self.load_before:.2f} before it began (quiet: {LOAD_MAX})"
            )
        if self.steal_percent > STEAL_PERCENT_MAX:
            found.append(
                f"the hypervisor took {self.steal_percent:.1f} % of the processors' time "
                f"(quiet: {STEAL_PERCENT_MAX:.0f} %)"
            )
        if self.others_percent and max(self.others_percent) > OTHERS_PERCENT_MAX:
            found.append(
                "others kept the processors busy while the benchmark was idle: "
                f"{statistics.median(self.others_percent):.0f} % in the middle, "
                f"{max(self.others_percent):.0f} % at most (quiet: {OTHERS_PERCENT_MAX:.0f} %)"
            )
        return found

    def facts(self) -> dict[str, str]:
        others = self.others_percent or [0.0]
        return {
            "load average before, after": f"{self.load_before:.2f}, {self.load_after:.2f} "
            "(after: the benchmark's own load too)",
            "steal time during the run": f"{self.steal_percent:.2f} %",
            "others' use of the processors": f"{statistics.median(others):.1f} % in the middle, "
            f"{max(others):.1f} % at most of {len(self.others_percent)} looks",
        }


class NoiseMeter:
    """Measures the noise of a run, from when it is made to finish()."""

    def __init__(self) -> None:
        self._start = processors()
        self.noise = Noise(os.getloadavg()[0])

    def look(self) -> None:
        """Do nothing for a moment, and see whether the processors are busy all the same."""
        start = processors()
        pause(IDLE_LOOK_SECONDS)
        self.noise.others_percent.append(processors().since(start).busy_percent())

    def finish(self) -> Noise:
        self.noise.load_after = os.getloadavg()[0]
        self.noise.steal_percent = processors().since(self._start).steal_percent()
        return self.noise
