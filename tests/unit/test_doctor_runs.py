"""`farmem doctor` as it is typed, on this host: as root, as an ordinary user, in sandboxes.

A sandbox is a seccomp filter, a tight limit, or a mount namespace of its own in which
/dev/userfaultfd is a node of ours: nothing of the host is changed. Whatever is taken away,
the doctor ends with a status and without a traceback.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from farmem.doctor.host import KILLED, Host
from tests.harness import FARMEM, as_user, compile_c

LIMIT_SECONDS = 300
SYS_USERFAULTFD, SYS_IO_URING_SETUP, SYS_PIDFD_OPEN = "323", "425", "434"
DEVICE = Path("/dev/userfaultfd")
DEVICE_GROUP = 64123  # a number is enough: the group needs no name
OPEN_TO_ALL = Path("/proc/sys/vm/unprivileged_userfaultfd")


class Report(NamedTuple):
    status: int
    can_run: bool
    checks: dict[str, dict[str, Any]]

    def mark(self, name: str) -> str:
        return str(self.checks[name]["mark"])

    def found(self, name: str) -> str:
        return str(self.checks[name]["found"])

    def mend(self, name: str) -> str:
        return " | ".join(self.checks[name]["mend"])


def doctor(*wrapper: str | Path, **options: Any) -> Report:
    command = [*map(str, wrapper), str(FARMEM), "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS, **options
    )
    assert done.stderr == "", done.stderr
    told = json.loads(done.stdout)
    report = Report(
        done.returncode, told["can_run"], {check["name"]: check for check in told["checks"]}
    )
    assert report.status == (0 if report.can_run else 1)
    assert "Traceback" not in done.stdout
    return report


def without_calls(verdict: str, *numbers: str) -> list[str]:
    return [str(compile_c("without_calls")), verdict, *numbers, "--"]


def nobody(groups: list[int] | None = None) -> list[str]:
    words = as_user("nobody", groups or [])
    reach = subprocess.run([*words, str(FARMEM), "--help"], capture_output=True, check=False)
    if reach.returncode != 0:
        pytest.skip("other users can't run farmem from this checkout")
    return words


def device_for(folder: Path, mode: str, group: int) -> list[str]:
    """Words before a command: /dev/userfaultfd has this mode and group, for the command alone."""
    if not DEVICE.exists():
        pytest.skip("there is no /dev/userfaultfd")
    number = DEVICE.stat().st_rdev
    script = (
        f"mount -t tmpfs none {folder} && mknod {folder}/u c {os.major(number)} {os.minor(number)}"
        f" && chown 0:{group} {folder}/u && chmod {mode} {folder}/u"
        f' && mount --bind {folder}/u {DEVICE} && exec "$@"'
    )
    return ["unshare", "-m", "sh", "-c", script, "sh"]


def is_open_to_all() -> bool:
    return OPEN_TO_ALL.exists() and OPEN_TO_ALL.read_text().strip() == "1"


@pytest.mark.uffd
@pytest.mark.move
def test_where_farmem_runs_the_trial_was_really_paged() -> None:
    report = doctor()
    assert report.status == 0
    assert report.mark("trial") == "ok"
    assert report.checks["trial"]["values"]["pages_evicted"] >= 1000
    assert report.mark("userfaultfd") == "ok"


@pytest.mark.uffd
@pytest.mark.move
def test_the_lines_for_people_say_the_same() -> None:
    done = subprocess.run(
        [str(FARMEM), "doctor"], capture_output=True, text=True, check=True, timeout=LIMIT_SECONDS
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "Required"
    assert lines[-1] == "farmem can run programs here."
    assert any(line.startswith("  ok       a trial run") for line in lines)
    assert "\x1b" not in done.stdout


@pytest.mark.uffd
@pytest.mark.move
def test_the_doctor_in_a_job_tries_a_job_of_its_own() -> None:
    report = doctor(FARMEM, "run", "-q", "-m", "64M", "--")
    assert report.status == 0, report.checks["trial"]


@pytest.mark.uffd
@pytest.mark.move
def test_the_trial_is_not_run_by_the_users_configuration(tmp_path: Path) -> None:
    """With these filters no page would ever come back."""
    config = tmp_path / "farmem.toml"
    config.write_text('[run]\nfilter = ["error:fetch=1"]\n')
    ours = {"FARMEM_CONFIG": str(config), "FARMEM_RUN_FILTER": "error:fetch=1"}
    report = doctor(env={**os.environ, **ours})
    assert report.status == 0, report.checks["trial"]


@pytest.mark.root
def test_as_an_ordinary_user(tmp_path: Path) -> None:
    report = doctor(*device_for(tmp_path, "600", 0), *nobody())
    if is_open_to_all():
        assert report.status == 0
        return
    assert report.status == 1
    assert report.checks["userfaultfd"]["values"]["refused_by"] == "sysctl"
    assert "sysctl vm.unprivileged_userfaultfd=1" in report.mend("userfaultfd")
    assert report.mark("userfaultfd_device") == "missing"
    assert "crw------- root:root: EACCES for user nobody" in report.found("userfaultfd_device")
    assert "usermod -aG userfaultfd nobody" in report.mend("userfaultfd_device")
    # The features are known all the same: from a descriptor for user-mode faults.
    assert report.mark("uffd_wp") == "ok"
    assert report.mark("trial") == "unknown"


@pytest.mark.root
def test_as_an_ordinary_user_who_is_not_in_the_devices_group(tmp_path: Path) -> None:
    if is_open_to_all():
        pytest.skip("vm.unprivileged_userfaultfd is 1")
    report = doctor(*device_for(tmp_path, "660", DEVICE_GROUP), *nobody())
    assert report.status == 1
    assert f"root:{DEVICE_GROUP}" in report.found("userfaultfd_device")
    assert f"groupadd -g {DEVICE_GROUP}" in report.mend("userfaultfd_device")


@pytest.mark.root
@pytest.mark.move
def test_as_an_ordinary_user_of_the_devices_group(tmp_path: Path) -> None:
    report = doctor(*device_for(tmp_path, "660", DEVICE_GROUP), *nobody([DEVICE_GROUP]))
    assert report.status == 0, report.checks["trial"]
    assert report.mark("userfaultfd_device") == "ok"
    assert report.mark("trial") == "ok"


@pytest.mark.root
@pytest.mark.parametrize(
    ("verdict", "error"), [(str(errno.EPERM), "EPERM"), (str(errno.ENOSYS), "ENOSYS")]
)
def test_in_a_sandbox_without_the_call(tmp_path: Path, verdict: str, error: str) -> None:
    """As in a container: the filter, not the setting, is to blame."""
    sandbox = [*device_for(tmp_path, "600", 0), *without_calls(verdict, SYS_USERFAULTFD)]
    report = doctor(*sandbox, *nobody())
    assert report.status == 1
    assert report.checks["userfaultfd"]["values"]["refused_by"] == "seccomp"
    assert error in report.found("userfaultfd")
    assert "--security-opt seccomp=" in report.mend("userfaultfd")
    assert "sysctl" not in report.mend("userfaultfd")
    assert report.checks["seccomp"]["values"]["refused"] == ["userfaultfd"]
    assert report.mark("uffd_wp") == "unknown"


@pytest.mark.root
@pytest.mark.move
def test_in_a_sandbox_the_device_is_a_way_out(tmp_path: Path) -> None:
    sandbox = [*device_for(tmp_path, "600", 0), *without_calls("1", SYS_USERFAULTFD)]
    report = doctor(*sandbox)
    assert report.status == 0, report.checks["trial"]
    assert report.checks["userfaultfd"]["values"]["way"] == "device"
    assert report.mark("seccomp") == "warning"


def test_a_filter_that_kills_does_not_kill_the_doctor() -> None:
    report = doctor(*without_calls("kill", SYS_USERFAULTFD, SYS_IO_URING_SETUP))
    assert report.status == 1
    assert report.checks["userfaultfd"]["values"]["refused_by"] == "seccomp"
    assert "SIGSYS" in report.found("userfaultfd")
    assert report.mark("io_uring") == "missing"
    assert report.checks["seccomp"]["values"]["refused"] == ["userfaultfd", "io_uring_setup"]


def test_a_call_that_every_job_makes_is_refused() -> None:
    report = doctor(*without_calls(str(errno.ENOSYS), SYS_PIDFD_OPEN))
    assert report.status == 1
    assert report.mark("calls") == "missing"
    assert "pidfd_open" in report.mend("calls")


@pytest.mark.uffd
@pytest.mark.move
@pytest.mark.parametrize(("limit", "can_run"), [(6, False), (8, False), (12, False), (48, True)])
def test_with_few_descriptors(limit: int, can_run: bool) -> None:
    """From not enough to look at anything to enough for a small job."""
    shell = ["sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh"]
    report = doctor(*shell)
    assert report.can_run == can_run
    assert report.mark("limit_nofile") == ("warning" if can_run else "missing")
    assert "limits.conf" in report.mend("limit_nofile")


_LIMIT_THREADS = (
    "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NPROC, (1, 1)); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.root
def test_where_not_even_a_child_can_be_started() -> None:
    report = doctor(sys.executable, "-c", _LIMIT_THREADS, *nobody())
    assert report.status == 1
    assert "temporarily unavailable" in report.found("trial") + report.found("userfaultfd")
    assert report.mark("limit_nproc") == "warning"


@pytest.mark.root
def test_without_proc() -> None:
    script = 'mount -t tmpfs none /proc && exec "$@"'
    report = doctor("unshare", "-m", "sh", "-c", script, "sh")
    assert report.status == 1
    assert report.mark("proc") == "missing"
    assert "mount -t proc" in report.mend("proc")


def test_a_mistake_is_told_as_everywhere() -> None:
    done = subprocess.run(
        [str(FARMEM), "doctor", "--frob"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 125
    assert "farmem doctor --help" in done.stderr


# ---- what the Host tells -------------------------------------------------------------------------


def test_the_host_tells_what_the_system_tells() -> None:
    host = Host()
    assert host.read("/proc/self/comm") == Path("/proc/self/comm").read_text().strip()
    assert host.setting("/proc/sys/vm/no_such_setting") is None
    assert host.names_in("/no/such/folder") == []
    assert host.user.uid == os.geteuid()
    assert host.threads_of_user() >= 1
    total_bytes, available_bytes, _ = host.memory_bytes()
    assert total_bytes >= available_bytes > 0
    assert host.process_status("Pid") == str(os.getpid())
    assert host.has_module("json")
    assert not host.has_module("no_such_module")


def test_a_child_of_the_host_runs_with_the_environment_that_is_asked_for() -> None:
    ran = Host().python("import os, sys; print(dict(os.environ), sys.argv)", "a", environment={})
    assert ran.status == 0
    assert "HOME" not in ran.out
    assert "'a'" in ran.out


def test_a_probe_that_is_killed_is_told_and_leaves_nothing() -> None:
    code = (
        "import os; from farmem.doctor.host import Host, KILLED; host = Host()\n"
        "before = os.listdir('/proc/self/fd')\n"
        "print(host.call('IO_URING') == KILLED, host.userfaultfd.syscall_errno == KILLED)\n"
        "print(os.listdir('/proc/self/fd') == before)\n"
        "try: os.waitpid(-1, os.WNOHANG)\n"
        "except ChildProcessError: print('no child left')\n"
    )
    sandbox = without_calls("kill", SYS_USERFAULTFD, SYS_IO_URING_SETUP)
    done = subprocess.run(
        [*sandbox, sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["True True", "True", "no child left"]
    assert KILLED not in errno.errorcode
