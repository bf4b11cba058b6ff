"""Whether this is a container, and what its cgroups allow: memory, and threads.

Cgroups are read as the kernel shows them to this process: from /proc/self/cgroup and
/proc/self/mountinfo, version 1 and 2.  Every folder from the process's own up to the
mount's root may hold a limit; the smallest one counts.
"""

import posixpath
from typing import NamedTuple

from farmem.doctor.findings import Answer, Check, ok, warning
from farmem.doctor.host import Host
from farmem.sizes import format_bytes

_NO_LIMIT_BYTES = 1 << 62  # version 1 writes the largest number of whole pages
_DEPTH_MAX = 64
_FILES = {
    1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    2: ("memory.max", "memory.swap.max"),
}


# A job of a few processes takes so many: nine in each with a pool on a server, and in a supervisor.
THREADS_WISHED = 64


class ThreadLimit(NamedTuple):
    """The cgroup that has the least room for threads (processes are threads too)."""

    version: int
    folder: str
    most: int
    used: int


class MemoryLimit(NamedTuple):
    """The limits on this process's cgroup; None for no limit."""

    version: int
    limit_bytes: int | None
    swap_bytes: int | None  # version 1: memory and swap together; version 2: swap alone


def container_of(host: Host) -> str:
    """The kind of container that this is, and how it shows; empty for none."""
    for path, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if host.exists(path):
            return f"{kind} ({path} is there)"
    if host.exists("/run/systemd/container"):
        return f"{host.read('/run/systemd/container')} (/run/systemd/container says so)"
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        value = host.environment().get(name)
        if value:
            return f"{'kubernetes' if name.isupper() else value} (${name} is set)"
    return ""


def in_container(host: Host) -> bool:
    """Something says that this is a container."""
    return bool(container_of(host))


def sysctl(host: Host, setting: str) -> str:
    """What to type for a setting of the kernel; containers are shown the settings read-only."""
    return f"{'on the host: ' if host.is_read_only('/proc/sys') else ''}sudo sysctl {setting}"


def _own_groups(host: Host, controller: str) -> dict[int, str]:
    """This process's cgroup of a controller, by version of the interface."""
    found = {}
    for line in host.read("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            found[2] = path
        elif controller in controllers.split(","):
            found[1] = path
    return found


def _mounts(host: Host, controller: str) -> dict[int, tuple[str, str]]:
    """Where the hierarchies are mounted: the folder of the hierarchy, and the mount point."""
    found: dict[int, tuple[str, str]] = {}
    for line in host.read("/proc/self/mountinfo").splitlines():
        fields, _, tail = line.partition(" - ")
        kind, _, options = tail.partition(" ")
        root, point = fields.split()[3:5]
        if kind == "cgroup2":
            found.setdefault(2, (root, point))
        elif kind == "cgroup" and controller in options.rpartition(" ")[2].split(","):
            found.setdefault(1, (root, point))
    return found


def _folders(root: str, point: str, path: str, host: Host) -> list[str]:
    """The process's folder and those above it, as far as the mount shows them."""
    relative = posixpath.relpath(path, root)
    if relative.startswith("..") or not host.exists(posixpath.join(point, relative)):
        relative = "."  # a container that is shown its own folder as the top
    folder = posixpath.normpath(posixpath.join(point, relative))
    found = [folder]
    while folder != point and len(found) < _DEPTH_MAX:
        folder = posixpath.dirname(folder)
        found.append(folder)
    return found


def _smallest(host: Host, folders: list[str], name: str) -> int | None:
    smallest: int | None = None
    for folder in folders:
        try:
            text = host.read(posixpath.join(folder, name))
        except FileNotFoundError:
            continue  # the top of a hierarchy has no such file
        limit = _NO_LIMIT_BYTES if text == "max" else int(text)
        if limit < _NO_LIMIT_BYTES and (smallest is None or limit < smallest):
            smallest = limit
    return smallest


def _cgroup(host: Host, controller: str) -> tuple[int, list[str]] | None:
    """The version and the folders, from our own up; None where there is none to be seen."""
    own, mounts = _own_groups(host, controller), _mounts(host, controller)
    for version in (1, 2):  # where both are mounted, the controller is version 1's
        if version in own and version in mounts:
            return version, _folders(*mounts[version], own[version], host)
    return None


def memory_limit(host: Host) -> MemoryLimit | None:
    """The limit on our memory; None where there is no memory cgroup to be seen."""
    found = _cgroup(host, "memory")
    if found is None:
        return None
    version, folders = found
    return MemoryLimit(version, *(_smallest(host, folders, name) for name in _FILES[version]))


def thread_limit(host: Host) -> ThreadLimit | None:
    """Where the least room is; None where nothing is limited, as far as can be seen."""
    version, folders = _cgroup(host, "pids") or (0, [])
    limits = []
    for folder in folders:
        most = _smallest(host, [folder], "pids.max")
        if most is not None:
            used = int(host.read(posixpath.join(folder, "pids.current")))
            limits.append(ThreadLimit(version, folder, most, used))
    return min(limits, key=lambda limit: limit.most - limit.used, default=None)


def look_container(host: Host) -> Answer:
    """Information: hints are different in a container."""
    kind = container_of(host)
    return ok(f"looks like one: {kind}" if kind else "not one, as far as can be seen", kind=kind)


def look_memory_limit(host: Host) -> Answer:
    """The cgroup's limit: pages of mem: and staging count against it like everything else."""
    limit = memory_limit(host)
    if limit is None:
        return ok("no memory cgroup is to be seen", limit_bytes=None)
    values = limit._asdict()
    total_bytes = host.memory_bytes()[0]
    where = f"(cgroup v{limit.version})"
    if limit.limit_bytes is None or limit.limit_bytes >= total_bytes:
        return ok(f"no limit below this host's memory {where}", **values)
    size = format_bytes(limit.limit_bytes)
    return warning(
        f"{size} {where}: what goes to mem: counts against it too",
        f"keep -m and --pool mem:SIZE together below {size}",
        "page to a file instead: --pool file:PATH",
        **values,
    )


def look_thread_limit(host: Host) -> Answer:
    """pids.max, which counts threads and holds root as well."""
    limit = thread_limit(host)
    if limit is None:
        return ok("no limit that is to be seen", most=None, used=None)
    values = {"most": limit.most, "used": limit.used}
    found = f"{limit.most} (cgroup v{limit.version}), {limit.used} of them in use"
    if limit.most - limit.used >= THREADS_WISHED:
        return ok(found, **values)
    wanted = limit.used + 1024
    mend: tuple[str, ...] = (
        f"sudo sh -c 'echo {wanted} > {limit.folder}/pids.max'",
        f"in a unit of systemd: TasksMax={wanted}",
    )
    if in_container(host):
        mend = (f"start the container with --pids-limit {wanted}",)
    return warning(
        f"{found}: a process takes three threads more, nine with a pool on a server",
        *mend,
        **values,
    )


CASES = (
    Check("container", "container", look_container),
    Check("cgroup_memory", "memory limit of the cgroup", look_memory_limit),
    Check("cgroup_pids", "thread limit of the cgroup", look_thread_limit),
)
