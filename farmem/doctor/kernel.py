"""The kernel besides userfaultfd: its version, its settings, and the calls that it answers.

A filter's text can't be read.  So a seccomp filter is blamed for a refusal where one is set
and the kernel itself has no reason to refuse.
"""

import errno
import os
import re

from farmem.doctor.container import sysctl
from farmem.doctor.findings import Answer, Check, missing, ok, unknown, warning
from farmem.doctor.host import KILLED, Host
from farmem.doctor.userfaultfd import is_filtered, name_of, refused_by
from farmem.sizes import format_bytes

LEAST = (6, 8)
CLOSE_RANGE_SINCE = "5.9"
MOVE_MISCOUNTS_SINCE = (6, 18)
MAP_COUNT = 65530  # the kernel's own default
_CALLS = {
    "MEMFD": "memfd_create",
    "PIDFD": "pidfd_open",
    "CLOSE_RANGE": "close_range",  # the newest of them
}
_PROC_FILES = ("statm", "maps", "pagemap", "mem", "task", "environ")
_ALLOW = "let the seccomp filter (container profile, or SystemCallFilter=) allow"


def look_processor(host: Host) -> Answer:
    """farmem is built for x86-64 only."""
    machine = host.uname().machine
    if machine == "x86_64":
        return ok(machine, machine=machine)
    return missing(f"{machine}: farmem works on x86_64 only", "use an x86-64 host")


def look_kernel(host: Host) -> Answer:
    """The version is a hint; what it has is tried."""
    release, version = host.uname().release, host.kernel_version()
    if version is None:
        return unknown(f"the release {release!r} names no version")
    if version >= LEAST:
        return ok(f"Linux {release}", release=release)
    found = f"Linux {release}: farmem is made for 6.8 and newer"
    return warning(found, "use Linux 6.8 or newer", release=release)


def look_libc(host: Host) -> Answer:
    """libfarmem.so needs glibc."""
    name = host.libc()
    if name:
        return ok(name)
    return missing("not glibc: libfarmem.so needs it", "use a distribution with glibc")


def look_calls(host: Host) -> Answer:
    """Calls that every job makes."""
    failed = {key: host.call(key) for key in _CALLS if host.call(key)}
    if not failed:
        return ok(f"{', '.join(_CALLS.values())} answer")
    found = ", ".join(f"{_CALLS[key]} ({name_of(error)})" for key, error in failed.items())
    names = " ".join(_CALLS[key] for key in failed)
    newer = f"use Linux {CLOSE_RANGE_SINCE} or newer"
    return missing(f"refused: {found}", f"{_ALLOW}: {names}" if is_filtered(host) else newer)


def look_proc(host: Host) -> Answer:
    """The engine sees its own process through /proc."""
    refused: dict[str, list[str]] = {}
    for name in _PROC_FILES:
        try:
            os.close(os.open(host.path(f"/proc/self/{name}"), os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            refused.setdefault(error.strerror or str(error), []).append(name)
    if not refused:
        return ok(f"/proc/self: {', '.join(_PROC_FILES)} can be opened")
    found = "; ".join(f"{', '.join(names)} ({why})" for why, names in refused.items())
    return missing(f"/proc/self: not {found}", "sudo mount -t proc proc /proc")


def _newer(error: int, since: str) -> list[str]:
    """A newer kernel helps where this one does not know what is meant."""
    known = error not in (errno.EINVAL, errno.ENOTTY, errno.ENOSYS)
    return [] if known else [f"use Linux {since} or newer"]


def look_pagemap_scan(host: Host) -> Answer:
    """Without it the page map is read page by page: the same result."""
    error = host.call("PAGEMAP_SCAN")
    if error == 0:
        return ok("there")
    return missing(
        f"{name_of(error)}: taking over memory looks at every page instead", *_newer(error, "6.7")
    )


def look_populate_write(host: Host) -> Answer:
    """Pages that a fork shares are made private with it before they can leave."""
    error = host.call("POPULATE_WRITE")
    if error == 0:
        return ok("there")
    return missing(
        f"{name_of(error)}: what a fork shares stays local, over the budget",
        *_newer(error, "5.14"),
    )


def look_move_count(host: Host) -> Answer:
    """A known defect of the kernel, worked around."""
    version = host.kernel_version()
    if version is not None and version >= MOVE_MISCOUNTS_SINCE:
        return ok("this kernel's can move pages and not count them: farmem looks for itself")
    return ok("counts rightly, as far as is known")


# ---- seccomp -----------------------------------------------------------------------------------


def _filtered_calls(host: Host) -> list[str]:
    """Those of our calls that the filter refuses."""
    refusals = (errno.EPERM, errno.EACCES, errno.ENOSYS, KILLED)
    names = [name for key, name in _CALLS.items() if host.call(key) in refusals]
    if refused_by(host) == "seccomp":
        names.insert(0, "userfaultfd")
    if _io_uring_refused_by(host) == "seccomp":
        names.append("io_uring_setup")
    return names


def look_seccomp(host: Host) -> Answer:
    """Whether a filter is set for this process, and what it takes from us."""
    mode = host.process_status("Seccomp")
    if mode in ("", "0"):
        return ok("no filter", mode=0)
    if mode != "2":
        return warning(f"mode {mode}", mode=mode)
    count = host.process_status("Seccomp_filters")
    found = f"{count or 'some'} filter{'' if count == '1' else 's'}"
    names = _filtered_calls(host)
    if not names:
        return ok(f"{found}; nothing that farmem calls is refused", mode=2, refused=[])
    return warning(
        f"{found}; refused: {', '.join(names)}", f"{_ALLOW}: {' '.join(names)}",
        mode=2, refused=names,
    )  # fmt: skip


# ---- settings ----------------------------------------------------------------------------------


def look_map_count(host: Host) -> Answer:
    """Managed memory has more, smaller mappings than the program made."""
    value = host.setting("/proc/sys/vm/max_map_count")
    if value is None:
        return ok("this kernel has no such setting")
    if value >= MAP_COUNT:
        return ok(str(value), value=value)
    return warning(
        f"{value}: a program with many mappings may run out of them",
        sysctl(host, f"vm.max_map_count={MAP_COUNT}"),
        value=value,
    )


def look_overcommit(host: Host) -> Answer:
    """A program that needs more than the host has must be allowed to ask for it."""
    value = host.setting("/proc/sys/vm/overcommit_memory")
    mend = sysctl(host, "vm.overcommit_memory=1")
    if value == 0:
        total_bytes, _, swap_bytes = host.memory_bytes()
        size = format_bytes(total_bytes + swap_bytes)
        return warning(f"0: a program can't allocate more than {size} at once", mend, value=value)
    if value == 2:
        return warning(
            "2: a program can't allocate more than the kernel's commit limit", mend, value=value
        )
    return ok(f"{value}: a program may allocate what it likes", value=value)


def look_huge_pages(host: Host) -> Answer:
    """Information: huge pages are split when they leave."""
    try:
        text = host.read("/sys/kernel/mm/transparent_hugepage/enabled")
    except FileNotFoundError:
        return ok("this kernel has none")
    found = re.search(r"\[(\w+)\]", text)
    mode = found[1] if found else text
    return ok(f"{mode}" + ("" if mode == "never" else ": split when they are evicted"), mode=mode)


def look_memfd_noexec(host: Host) -> Answer:
    """farmem seals its memory against execution by itself."""
    value = host.setting("/proc/sys/vm/memfd_noexec")
    if value is None:
        return ok("this kernel has no such setting")
    if host.call("MEMFD"):
        return warning(f"{value}, and memory is refused ({name_of(host.call('MEMFD'))})")
    return ok(f"{value}: farmem's memory is sealed against execution anyway", value=value)


def _io_uring_refused_by(host: Host) -> str:
    """ "", "kernel", "sysctl", "seccomp" or another error's name."""
    why = host.call("IO_URING")
    if why == 0:
        return ""
    setting = host.setting("/proc/sys/kernel/io_uring_disabled")
    if why == errno.EPERM and setting in (1, 2):
        return "sysctl"
    if why == KILLED or (is_filtered(host) and (why != errno.ENOSYS or setting is not None)):
        return "seccomp"
    return "kernel" if why == errno.ENOSYS else name_of(why)


def look_io_uring(host: Host) -> Answer:
    """file: pools use it where they may; a pool of threads does the same work slower."""
    setting = host.setting("/proc/sys/kernel/io_uring_disabled")
    cause = _io_uring_refused_by(host)
    if not cause:
        return ok("allowed", io_uring_disabled=setting)
    found, mend = {
        "sysctl": (
            f"kernel.io_uring_disabled is {setting}",
            sysctl(host, "kernel.io_uring_disabled=0"),
        ),
        "seccomp": ("a seccomp filter refuses it", f"{_ALLOW}: io_uring_setup io_uring_enter"),
        "kernel": ("this kernel has none", "use a kernel with CONFIG_IO_URING=y"),
    }.get(cause, (cause, ""))
    return missing(
        f"{found}: threads do its work", *filter(None, [mend]), io_uring_disabled=setting
    )


REQUIRED = (
    Check("processor", "processor", look_processor),
    Check("kernel", "kernel", look_kernel),
    Check("libc", "C library", look_libc),
    Check("calls", "system calls", look_calls),
    Check("proc", "/proc", look_proc),
)
CASES = (
    Check("populate_write", "MADV_POPULATE_WRITE", look_populate_write),
    Check("seccomp", "seccomp", look_seccomp),
    Check("overcommit_memory", "vm.overcommit_memory", look_overcommit),
    Check("max_map_count", "vm.max_map_count", look_map_count),
    Check("memfd_noexec", "vm.memfd_noexec", look_memfd_noexec),
)
OPTIONAL = (
    Check("pagemap_scan", "PAGEMAP_SCAN", look_pagemap_scan),
    Check("move_count", "UFFDIO_MOVE's count", look_move_count),
    Check("huge_pages", "transparent huge pages", look_huge_pages),
    Check("io_uring", "io_uring", look_io_uring),
)
