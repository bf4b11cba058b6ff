"""userfaultfd: whether it can be had, why not, who would have to let us, and its features.

The kernel always grants a descriptor for user-mode faults alone (since Linux 5.11).  So
where even that one is refused it is not the kernel who refuses, but a seccomp filter or a
security module: that is how a container's profile is told from the sysctl.
"""

import errno
import grp
import stat

from farmem.doctor.container import in_container, sysctl
from farmem.doctor.findings import Answer, Check, Mark, missing, ok, unknown, warning
from farmem.doctor.host import KILLED, Host

SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"
DEVICE = "/dev/userfaultfd"
GROUP = "userfaultfd"
USER_MODE_SINCE = (5, 11)
_CAUSES = {0: "", KILLED: "seccomp"}
_LET_EVERYBODY = "vm.unprivileged_userfaultfd=1"
_PASS_DEVICE = "start the container with --device /dev/userfaultfd"
_PROFILE = (
    "start the container with --security-opt seccomp=FILE, where FILE allows userfaultfd; "
    "in a systemd unit: SystemCallFilter=userfaultfd"
)
_NEWER_KERNEL = "use a kernel with CONFIG_USERFAULTFD=y, Linux 6.8 or newer"


def name_of(error: int) -> str:
    """EPERM for 1; what killed the child has no errno."""
    return "SIGSYS" if error == KILLED else errno.errorcode.get(error, str(error))


def is_filtered(host: Host) -> bool:
    """A seccomp filter is set for this process."""
    return host.process_status("Seccomp") == "2"


def refused_by(host: Host) -> str:
    """Who refuses the system call: "", "kernel", "sysctl", "seccomp" or "module"."""
    why = host.userfaultfd.syscall_errno
    if why in _CAUSES:
        return _CAUSES[why]
    if why == errno.ENOSYS and not (host.exists(SYSCTL) or host.exists(DEVICE)):
        return "kernel"
    if host.userfaultfd.user_mode_errno == 0 or _sysctl_explains(host):
        return "sysctl"
    return "seccomp" if is_filtered(host) else "module"


def _sysctl_explains(host: Host) -> bool:
    """Before Linux 5.11 there is no such thing as user-mode only: the setting decides alone."""
    is_old = (host.kernel_version() or USER_MODE_SINCE) < USER_MODE_SINCE
    return is_old and host.setting(SYSCTL) == 0 and not host.user.may_trace


def _cause(host: Host) -> str:
    error = name_of(host.userfaultfd.syscall_errno)
    rights = "this user has no CAP_SYS_PTRACE"
    if host.user.in_namespace:
        rights += " outside this user namespace"
    return {
        "kernel": "this kernel has no userfaultfd",
        "sysctl": f"only for user-mode faults: vm.unprivileged_userfaultfd is 0, and {rights}",
        "seccomp": f"a seccomp filter refuses the system call ({error})",
        "module": f"a security module refuses the system call ({error})",
    }[refused_by(host)]


def _ways_out(host: Host) -> list[str]:
    cause = refused_by(host)
    ways = {
        "kernel": _NEWER_KERNEL,
        "sysctl": sysctl(host, _LET_EVERYBODY),
        "seccomp": _PROFILE,
        "module": "see what it says: sudo journalctl -k --grep userfaultfd",
    }
    # Where the filter kills, the call must not even be tried, and farmem tries it first.
    device_helps = cause != "kernel" and host.userfaultfd.syscall_errno != KILLED
    device = ["let this user open /dev/userfaultfd: its line below says how"]
    return [ways[cause], *(device if device_helps and _ways_to_the_device(host) else [])]


def look_userfaultfd(host: Host) -> Answer:
    """Can a userfaultfd be had that sees the faults of system calls too?"""
    seen = host.userfaultfd
    values = {"way": seen.way, "user_mode": seen.user_mode_errno == 0}
    if seen.way == "system call":
        return ok("granted by the system call", **values)
    if seen.way == "device":
        return ok(f"granted by {DEVICE}; {_cause(host)}", **values)
    values["refused_by"] = refused_by(host)
    return missing(_cause(host), *_ways_out(host), **values)


# ---- the device ------------------------------------------------------------------------------


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _is_listed(gid: int, name: str) -> bool:
    try:
        return name in grp.getgrgid(gid).gr_mem
    except KeyError:
        return False


def _describe(host: Host) -> str:
    status = host.status_of(DEVICE)
    owner = "root" if status.st_uid == 0 else str(status.st_uid)
    return f"{stat.filemode(status.st_mode)} {owner}:{_group_name(status.st_gid)}"


def _ways_to_the_device(host: Host) -> list[str]:
    """What to type so that this user may open /dev/userfaultfd."""
    if not host.exists(DEVICE):
        return [_PASS_DEVICE] if in_container(host) else []
    if host.userfaultfd.device_errno == errno.EPERM:
        return [_PASS_DEVICE]  # the file may be opened, the cgroup of devices says no
    status, user = host.status_of(DEVICE), host.user
    if status.st_gid != 0 and status.st_mode & 0o060 == 0o060:
        group = _group_name(status.st_gid)
        if _is_listed(status.st_gid, user.name):
            return [f"log in again: {user.name} is in group {group}, but this session is not"]
        make = f"sudo groupadd -g {group} {GROUP} && " if group.isdigit() else ""
        group = GROUP if make else group
        return [f"{make}sudo usermod -aG {group} {user.name}, then log in again"]
    return [
        f"sudo groupadd -f {GROUP} && sudo usermod -aG {GROUP} {user.name} && sudo chgrp {GROUP} "
        f"{DEVICE} && sudo chmod 660 {DEVICE}, then log in again"
    ]


def look_device(host: Host) -> Answer:
    """/dev/userfaultfd: the way for users without privilege."""
    why = host.userfaultfd.device_errno
    is_needed = host.userfaultfd.way == "none"
    if why == 0:
        return ok(f"{_describe(host)}: this user may open it")
    if not host.exists(DEVICE):
        found = "not there (Linux 6.1 and newer have it)"
        return missing(found, *_ways_to_the_device(host)) if is_needed else warning(found)
    found = f"{_describe(host)}: {name_of(why)} for user {host.user.name}"
    return missing(found, *_ways_to_the_device(host)) if is_needed else ok(f"{found}; not needed")


def look_sysctl(host: Host) -> Answer:
    """vm.unprivileged_userfaultfd."""
    value = host.setting(SYSCTL)
    if value is None:
        return ok("this kernel has no such setting")
    if value != 0:
        return ok(f"{value}: every user may have all of userfaultfd", value=value)
    found = "0: only with CAP_SYS_PTRACE, or through /dev/userfaultfd"
    if host.userfaultfd.way == "none" and refused_by(host) == "sysctl":
        return warning(found, sysctl(host, _LET_EVERYBODY), value=value)
    return ok(found, value=value)


# ---- its features ----------------------------------------------------------------------------


def _feature(
    name: str, label: str, since: str, without: str, *mend: str, absent: Mark = Mark.MISSING
) -> Check:
    def look(host: Host) -> Answer:
        from farmem import _native

        features = host.userfaultfd.features
        if features is None:
            return unknown("there is no userfaultfd to ask")
        if features & getattr(_native.lib, f"FM_PROBE_FEATURE_{name}"):
            return ok("there")
        found = f"not there: {without}" if without else "not there"
        return Answer(absent, found, (f"use Linux {since} or newer", *mend))

    return Check(f"uffd_{name.lower()}", label, look)


_EVENT = "the engine would not see how the program changes its memory"
REQUIRED = (
    Check("userfaultfd", "userfaultfd", look_userfaultfd),
    _feature("WP", "write protection (WP)", "5.7", "read-only pages could not be evicted"),
    _feature("EVENT_REMAP", "EVENT_REMAP", "4.11", _EVENT),
    _feature("EVENT_REMOVE", "EVENT_REMOVE", "4.11", _EVENT),
    _feature("EVENT_UNMAP", "EVENT_UNMAP", "4.11", _EVENT),
)
CASES = (
    Check("userfaultfd_device", "/dev/userfaultfd", look_device),
    Check("unprivileged_userfaultfd", "vm.unprivileged_userfaultfd", look_sysctl),
    _feature(
        "MOVE",
        "UFFDIO_MOVE",
        "6.8",
        "programs that pin memory (O_DIRECT, io_uring, RDMA) can't be run",
        "for a program that pins none: farmem run --no-pinned-io",
    ),
    _feature(
        "POISON", "UFFDIO_POISON", "6.6", "a lost page ends the program at once, not with SIGBUS"
    ),
)
OPTIONAL = (
    _feature("WP_ASYNC", "WP_ASYNC", "6.7", "nothing needs it yet"),
    _feature("SIGBUS", "SIGBUS", "4.14", "nothing needs it yet"),
)
