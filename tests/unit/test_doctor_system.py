"""What the doctor concludes about the kernel, limits, containers and RDMA of a played host."""

import errno
from pathlib import Path

import pytest

from farmem.doctor import limits as limits_of_doctor
from farmem.doctor.container import memory_limit
from farmem.doctor.findings import Mark
from farmem.doctor.host import KILLED, NO_LIMIT, Ran, User
from tests.unit.played_host import GIB, PlayedHost, answer, mends, refused


@pytest.fixture
def host(tmp_path: Path) -> PlayedHost:
    return PlayedHost(tmp_path)


# ---- the kernel --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "mark"),
    [
        ("6.8.0-31-generic", Mark.OK),
        ("6.18.44", Mark.OK),
        ("10.0", Mark.OK),
        ("6.1.0-18-amd64", Mark.WARNING),
        ("unnamed", Mark.UNKNOWN),
    ],
)
def test_the_kernel_is_judged_by_its_version(host: PlayedHost, release: str, mark: Mark) -> None:
    host.release = release
    assert answer(host, "kernel").mark == mark


def test_another_processor_and_another_c_library_are_missing(host: PlayedHost) -> None:
    assert answer(host, "processor").mark == Mark.OK
    assert answer(host, "libc").mark == Mark.OK
    host.machine, host.libc_name = "aarch64", ""
    assert answer(host, "processor").mark == Mark.MISSING
    assert answer(host, "libc").mark == Mark.MISSING


def test_calls_that_every_job_makes(host: PlayedHost) -> None:
    assert answer(host, "calls").mark == Mark.OK
    host.calls["PIDFD"] = errno.ENOSYS
    found = answer(host, "calls")
    assert found.mark == Mark.MISSING
    assert "pidfd_open (ENOSYS)" in found.found
    assert mends(found) == "use Linux 5.9 or newer"
    host.filtered()
    assert "seccomp filter" in mends(answer(host, "calls"))
    host.calls["MEMFD"] = KILLED
    assert "memfd_create (SIGSYS)" in answer(host, "calls").found


def test_files_of_proc_that_can_not_be_opened_are_named(host: PlayedHost) -> None:
    for name in ("statm", "maps", "pagemap", "task", "environ"):
        host.write(f"/proc/self/{name}", "")
    found = answer(host, "proc")
    assert found.mark == Mark.MISSING
    assert found.found == "/proc/self: not mem (No such file or directory)"
    host.write("/proc/self/mem", "")
    assert answer(host, "proc").mark == Mark.OK


@pytest.mark.parametrize(("name", "call"), [
    ("pagemap_scan", "PAGEMAP_SCAN"), ("populate_write", "POPULATE_WRITE"),
])  # fmt: skip
def test_calls_that_can_be_done_without(host: PlayedHost, name: str, call: str) -> None:
    assert answer(host, name).mark == Mark.OK
    host.calls[call] = errno.ENOTTY
    found = answer(host, name)
    assert found.mark == Mark.MISSING
    assert "ENOTTY" in found.found
    assert "use Linux" in mends(found)
    host.calls[call] = errno.EACCES  # a newer kernel would not help
    assert answer(host, name).mend == ()


def test_the_miscount_of_moves_is_told_where_it_is_known(host: PlayedHost) -> None:
    host.release = "6.18.44"
    found = answer(host, "move_count")
    assert found.mark == Mark.OK
    assert "not count" in found.found
    host.release = "6.12.1"
    assert "not count" not in answer(host, "move_count").found


def test_what_a_filter_refuses_is_listed(host: PlayedHost) -> None:
    assert answer(host, "seccomp").values["mode"] == 0
    host.filtered()
    found = answer(host, "seccomp")
    assert (found.mark, found.values["refused"]) == (Mark.OK, [])
    host.userfaultfd = refused(errno.EPERM, errno.EPERM)
    host.calls.update(CLOSE_RANGE=errno.EPERM, IO_URING=errno.EPERM)
    found = answer(host, "seccomp")
    assert found.mark == Mark.WARNING
    assert found.values["refused"] == ["userfaultfd", "close_range", "io_uring_setup"]
    assert "allow: userfaultfd close_range io_uring_setup" in mends(found)


def test_strict_seccomp_is_mentioned(host: PlayedHost) -> None:
    host.write("/proc/self/status", "Seccomp:\t1\n")
    assert answer(host, "seccomp").mark == Mark.WARNING


@pytest.mark.parametrize(
    ("why", "setting", "is_filtered", "cause"),
    [
        (errno.EPERM, "2", False, "kernel.io_uring_disabled is 2"),
        (errno.EPERM, "1", True, "kernel.io_uring_disabled is 1"),
        (errno.EPERM, "0", True, "seccomp filter"),
        (errno.ENOSYS, "0", True, "seccomp filter"),
        (KILLED, "0", True, "seccomp filter"),
        (errno.ENOSYS, None, True, "this kernel has none"),
        (errno.ENOSYS, None, False, "this kernel has none"),
        (errno.EACCES, "0", False, "EACCES"),
    ],
)
def test_who_refuses_io_uring_is_told_apart(
    host: PlayedHost, why: int, setting: str | None, is_filtered: bool, cause: str
) -> None:
    if setting is not None:
        host.write("/proc/sys/kernel/io_uring_disabled", setting)
    if is_filtered:
        host.filtered()
    assert answer(host, "io_uring").mark == Mark.OK
    host.calls["IO_URING"] = why
    found = answer(host, "io_uring")
    assert found.mark == Mark.MISSING
    assert cause in found.found


@pytest.mark.parametrize(
    ("value", "mark"), [("0", Mark.WARNING), ("1", Mark.OK), ("2", Mark.WARNING)]
)
def test_overcommit_decides_what_a_program_may_ask_for(
    host: PlayedHost, value: str, mark: Mark
) -> None:
    host.write("/proc/sys/vm/overcommit_memory", value)
    host.memory = (16 * GIB, 8 * GIB, 4 * GIB)
    found = answer(host, "overcommit_memory")
    assert found.mark == mark
    assert ("20.0 GiB" in found.found) == (value == "0")
    assert bool(found.mend) == (mark == Mark.WARNING)


def test_a_low_map_count_is_to_be_raised(host: PlayedHost) -> None:
    host.write("/proc/sys/vm/max_map_count", "65530")
    assert answer(host, "max_map_count").mark == Mark.OK
    host.write("/proc/sys/vm/max_map_count", "1000")
    assert mends(answer(host, "max_map_count")) == "sudo sysctl vm.max_map_count=65530"
    host.take("/proc/sys/vm/max_map_count")
    assert answer(host, "max_map_count").mark == Mark.OK


def test_huge_pages_by_their_mode(host: PlayedHost) -> None:
    assert answer(host, "huge_pages").mark == Mark.OK
    host.write("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    assert answer(host, "huge_pages").values["mode"] == "madvise"


def test_memory_that_may_not_be_executable(host: PlayedHost) -> None:
    assert answer(host, "memfd_noexec").mark == Mark.OK
    host.write("/proc/sys/vm/memfd_noexec", "2")
    assert answer(host, "memfd_noexec").mark == Mark.OK
    host.calls["MEMFD"] = errno.EACCES
    assert answer(host, "memfd_noexec").mark == Mark.WARNING


# ---- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "mark", "mend"),
    [
        ((NO_LIMIT, NO_LIMIT), Mark.OK, ""),
        ((20000, 20000), Mark.OK, ""),
        ((100, 100000), Mark.WARNING, "ulimit -n 4096"),
        ((100, NO_LIMIT), Mark.WARNING, "ulimit -n 4096"),
        ((100, 100), Mark.WARNING, "/etc/security/limits.conf"),
        ((12, 4096), Mark.MISSING, "ulimit -n 4096"),
    ],
)
def test_open_files(host: PlayedHost, limit: tuple[int, int], mark: Mark, mend: str) -> None:
    host.limits["NOFILE"] = limit
    found = answer(host, "limit_nofile")
    assert found.mark == mark
    assert mend in mends(found)


def test_address_space(host: PlayedHost) -> None:
    assert answer(host, "limit_as").mark == Mark.OK
    host.limits["AS"] = (8 * GIB, NO_LIMIT)
    assert answer(host, "limit_as").mark == Mark.WARNING
    host.limits["AS"] = (64 * GIB, NO_LIMIT)
    assert answer(host, "limit_as").mark == Mark.OK


def test_threads(host: PlayedHost) -> None:
    host.limits["NPROC"] = (50, NO_LIMIT)
    found = answer(host, "limit_nproc")
    assert found.mark == Mark.WARNING
    assert "ulimit -u" in mends(found)
    host.threads = 0
    host.limits["NPROC"] = (5000, 5000)
    assert answer(host, "limit_nproc").mark == Mark.OK
    host.limits["NPROC"] = (1, 1)
    host.user = User("root", 0, True, False)
    assert answer(host, "limit_nproc").mark == Mark.OK


def test_locked_memory_matters_with_rdma_alone(host: PlayedHost) -> None:
    host.limits["MEMLOCK"] = (8 << 20, 8 << 20)
    assert answer(host, "limit_memlock").mark == Mark.OK
    host.write("/sys/class/infiniband/rxe0/ports/1/state", "4: ACTIVE")
    assert answer(host, "limit_memlock").mark == Mark.WARNING
    host.user = User("root", 0, True, False)
    assert answer(host, "limit_memlock").mark == Mark.OK


def test_the_hosts_memory_is_told(host: PlayedHost) -> None:
    found = answer(host, "memory")
    assert found.mark == Mark.OK
    assert found.values["total_bytes"] == 16 * GIB


def test_a_folder_without_direct_io(host: PlayedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_of_doctor, "_write_directly", lambda folder: errno.EINVAL)
    assert answer(host, "direct_io").mark == Mark.MISSING
    monkeypatch.setattr(limits_of_doctor, "_write_directly", lambda folder: errno.EROFS)
    found = answer(host, "direct_io")
    assert found.mark == Mark.UNKNOWN
    assert "Read-only" in found.found
    assert "TMPDIR" in mends(found)


def test_direct_io_leaves_nothing_behind(tmp_path: Path) -> None:
    assert limits_of_doctor._write_directly(str(tmp_path)) in (0, errno.EINVAL)
    assert list(tmp_path.iterdir()) == []
    assert limits_of_doctor._write_directly(str(tmp_path / "none")) == errno.ENOENT


# ---- containers --------------------------------------------------------------------------------


def test_kinds_of_containers(host: PlayedHost) -> None:
    assert answer(host, "container").values["kind"] == ""
    host.environ["container"] = "lxc"
    assert answer(host, "container").values["kind"].startswith("lxc")
    host.environ["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
    assert answer(host, "container").values["kind"].startswith("kubernetes")
    host.write("/run/systemd/container", "systemd-nspawn")
    assert answer(host, "container").values["kind"].startswith("systemd-nspawn")
    host.write("/run/.containerenv", "")
    assert answer(host, "container").values["kind"].startswith("podman")
    host.write("/.dockerenv", "")
    assert answer(host, "container").values["kind"].startswith("docker")


V2 = "30 25 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "31 25 0:27 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"
TMPFS = "25 20 0:25 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755"


def cgroups(host: PlayedHost, own: str, mounts: list[str], files: dict[str, str]) -> None:
    host.write("/proc/self/cgroup", own)
    host.write("/proc/self/mountinfo", "\n".join([TMPFS, *mounts]))
    for path, text in files.items():
        host.write(f"/sys/fs/cgroup/{path}", text)


def test_the_smallest_limit_on_the_way_up_counts(host: PlayedHost) -> None:
    cgroups(
        host, "0::/a/b", [V2],
        {"a/b/memory.max": "max", "a/memory.max": str(2 * GIB), "a/b/memory.swap.max": "0"},
    )  # fmt: skip
    assert memory_limit(host) == (2, 2 * GIB, 0)
    found = answer(host, "cgroup_memory")
    assert found.mark == Mark.WARNING
    assert "2.0 GiB (cgroup v2)" in found.found
    assert "below 2.0 GiB" in mends(found)


def test_a_limit_of_version_1(host: PlayedHost) -> None:
    own = "5:memory:/docker/1\n4:cpu,cpuacct:/\n0::/"
    files = {
        "memory/docker/1/memory.limit_in_bytes": str(GIB),
        "memory/docker/1/memory.memsw.limit_in_bytes": "9223372036854771712",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    cgroups(host, own, [V1], files)
    assert memory_limit(host) == (1, GIB, None)


def test_a_container_that_sees_its_own_folder_as_the_top(host: PlayedHost) -> None:
    """Without a cgroup namespace the path is the host's, and the mount shows a part of it."""
    shown = V1.replace("0:27 / ", "0:27 /docker/1 ")
    cgroups(host, "5:memory:/docker/1", [shown], {"memory/memory.limit_in_bytes": str(GIB)})
    assert memory_limit(host) == (1, GIB, None)
    cgroups(host, "5:memory:/elsewhere/1", [V1], {})
    assert memory_limit(host) == (1, GIB, None)
    cgroups(host, "5:memory:/../other", [V1], {})
    assert memory_limit(host) == (1, GIB, None)


V1_PIDS = "32 25 0:28 / /sys/fs/cgroup/pids rw,nosuid - cgroup cgroup rw,pids"


def test_threads_that_a_cgroup_allows(host: PlayedHost) -> None:
    """The one with the least room counts, not the one with the smallest limit."""
    files = {"a/b/pids.max": "max", "a/pids.max": "5000", "a/pids.current": "4990"}
    cgroups(host, "0::/a/b", [V2], files | {"pids.max": "900", "pids.current": "7"})
    found = answer(host, "cgroup_pids")
    assert (found.mark, dict(found.values)) == (Mark.WARNING, {"most": 5000, "used": 4990})
    assert "5000 (cgroup v2), 4990 of them in use" in found.found
    assert "> /sys/fs/cgroup/a/pids.max" in mends(found) and "TasksMax=6014" in mends(found)
    host.write("/run/.containerenv", "")
    assert "--pids-limit 6014" in mends(answer(host, "cgroup_pids"))
    host.write("/sys/fs/cgroup/a/pids.max", "5100")
    assert answer(host, "cgroup_pids").mark == Mark.OK


def test_threads_that_nobody_limits(host: PlayedHost) -> None:
    cgroups(host, "8:pids:/x\n0::/", [V1_PIDS], {"pids/x/pids.max": "max"})
    assert answer(host, "cgroup_pids").mark == Mark.OK
    cgroups(host, "8:pids:/x\n0::/", [], {})
    assert answer(host, "cgroup_pids").mark == Mark.OK
    files = {"pids/x/pids.max": "60", "pids/x/pids.current": "50"}
    cgroups(host, "8:pids:/x\n0::/", [V1_PIDS], files)
    assert answer(host, "cgroup_pids").mark == Mark.WARNING


def test_no_limit_and_no_cgroup(host: PlayedHost) -> None:
    cgroups(host, "0::/a", [V2], {"a/memory.max": "max"})
    assert answer(host, "cgroup_memory").mark == Mark.OK
    cgroups(host, "0::/a", [V2], {"a/memory.max": str(64 * GIB)})
    assert answer(host, "cgroup_memory").mark == Mark.OK
    cgroups(host, "0::/a", [], {})
    assert memory_limit(host) is None
    assert answer(host, "cgroup_memory").mark == Mark.OK


def test_cgroup_files_that_make_no_sense_are_not_believed(host: PlayedHost) -> None:
    cgroups(host, "0::/a", [V2], {"a/memory.max": "lots"})
    assert answer(host, "cgroup_memory").mark == Mark.UNKNOWN


# ---- RDMA --------------------------------------------------------------------------------------


def rdma(host: PlayedHost, state: str, node: bool = True) -> None:
    host.write("/sys/class/infiniband/mlx5_0/ports/1/state", state)
    if node:
        host.write("/dev/infiniband/uverbs0", "")


def test_rdma_devices(host: PlayedHost) -> None:
    found = answer(host, "rdma_devices")
    assert found.mark == Mark.MISSING
    assert "rdma_rxe" in mends(found)
    rdma(host, "4: ACTIVE")
    found = answer(host, "rdma_devices")
    assert (found.mark, found.found) == (Mark.OK, "mlx5_0: ACTIVE")
    rdma(host, "1: DOWN")
    assert answer(host, "rdma_devices").mark == Mark.WARNING


def test_rdma_devices_that_can_not_be_opened(
    host: PlayedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    rdma(host, "4: ACTIVE", node=False)
    assert "ib_uverbs" in mends(answer(host, "rdma_devices"))
    rdma(host, "4: ACTIVE")
    monkeypatch.setattr(host, "may_use", lambda path: False)
    assert "chmod 666 /dev/infiniband/uverbs0" in mends(answer(host, "rdma_devices"))


def test_rdma_libraries(host: PlayedHost) -> None:
    assert answer(host, "rdma_library").mark == Mark.OK
    assert answer(host, "pyverbs").found == "not installed"
    host.modules.add("pyverbs")
    assert answer(host, "pyverbs").mark == Mark.OK
    host.ran = Ran(1, "", "Traceback (most recent call last):\n  File x\nOSError: no libibverbs\n")
    assert answer(host, "rdma_library").found == "no libibverbs"
    assert answer(host, "pyverbs").found == "can't be imported: no libibverbs"
    assert "python3-pyverbs" in mends(answer(host, "pyverbs"))


def test_numba_is_not_needed(host: PlayedHost) -> None:
    assert answer(host, "numba").mark == Mark.MISSING
    host.modules.add("numba")
    assert answer(host, "numba").mark == Mark.OK
