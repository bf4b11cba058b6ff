"""What the doctor concludes about userfaultfd: who refuses it, who would have to let us, and
what each missing feature means.
"""

import errno
import grp
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from farmem import _native
from farmem.doctor import GROUPS
from farmem.doctor.findings import Mark
from farmem.doctor.host import KILLED, User, Userfaultfd
from tests.unit.played_host import (
    ALL_FEATURES,
    CHECKS,
    DEVICE,
    FULL,
    SYSCTL,
    PlayedHost,
    answer,
    mends,
    refused,
)


@pytest.fixture
def host(tmp_path: Path) -> PlayedHost:
    return PlayedHost(tmp_path)


def test_a_userfaultfd_by_the_system_call_is_all_that_is_needed(host: PlayedHost) -> None:
    found = answer(host, "userfaultfd")
    assert found.mark == Mark.OK
    assert found.values["way"] == "system call"


def test_a_userfaultfd_by_the_device_says_why_not_by_the_system_call(host: PlayedHost) -> None:
    host.userfaultfd = Userfaultfd("device", ALL_FEATURES, errno.EPERM, 0, 0)
    found = answer(host, "userfaultfd")
    assert found.mark == Mark.OK
    assert "/dev/userfaultfd" in found.found
    assert "vm.unprivileged_userfaultfd is 0" in found.found


@pytest.mark.parametrize(
    ("seen", "is_filtered", "release", "cause", "named", "mend"),
    [
        # The setting: user-mode faults are granted all the same.
        (refused(1, 0), False, "6.12.0", "sysctl", "CAP_SYS_PTRACE", "sysctl vm.unprivileged"),
        # ... also where a filter is set that has nothing to do with it.
        (refused(1, 0), True, "6.12.0", "sysctl", "CAP_SYS_PTRACE", "sysctl vm.unprivileged"),
        # A filter refuses both, with whatever error it likes, or kills.
        (refused(1, 1), True, "6.12.0", "seccomp", "EPERM", "--security-opt seccomp="),
        (refused(38, 38), True, "6.12.0", "seccomp", "ENOSYS", "SystemCallFilter="),
        (refused(KILLED, KILLED), True, "6.12.0", "seccomp", "SIGSYS", "SystemCallFilter="),
        # Neither: SELinux, say.
        (refused(13, 13), False, "6.12.0", "module", "EACCES", "journalctl"),
        # Before 5.11 the setting refuses user-mode faults too.
        (refused(1, 1), False, "5.10.0", "sysctl", "CAP_SYS_PTRACE", "sysctl vm.unprivileged"),
        (refused(1, 1), True, "5.10.0", "sysctl", "CAP_SYS_PTRACE", "sysctl vm.unprivileged"),
    ],
)
def test_who_refuses_is_told_apart(
    host: PlayedHost,
    seen: Userfaultfd,
    is_filtered: bool,
    release: str,
    cause: str,
    named: str,
    mend: str,
) -> None:
    host.userfaultfd, host.release = seen, release
    if is_filtered:
        host.filtered()
    found = answer(host, "userfaultfd")
    assert found.mark == Mark.MISSING
    assert found.values["refused_by"] == cause
    assert named in found.found
    assert mend in mends(found)


def test_the_old_setting_is_not_blamed_where_it_grants(host: PlayedHost) -> None:
    """Linux 5.10, the setting is 1: then EPERM comes from the filter."""
    host.userfaultfd, host.release = refused(errno.EPERM, errno.EINVAL), "5.10.0"
    host.write(SYSCTL, "1")
    host.filtered()
    assert answer(host, "userfaultfd").values["refused_by"] == "seccomp"
    host.write(SYSCTL, "0")
    host.user = User("root", 0, True, False)
    assert answer(host, "userfaultfd").values["refused_by"] == "seccomp"


def test_a_kernel_without_userfaultfd(host: PlayedHost) -> None:
    host.userfaultfd = refused(errno.ENOSYS, errno.ENOSYS, errno.ENOENT)
    host.take(SYSCTL)
    host.take(DEVICE)
    found = answer(host, "userfaultfd")
    assert found.values["refused_by"] == "kernel"
    assert "CONFIG_USERFAULTFD" in mends(found)
    assert answer(host, "uffd_wp").mark == Mark.UNKNOWN


def test_root_of_a_user_namespace_is_told_so(host: PlayedHost) -> None:
    host.userfaultfd = refused(errno.EPERM, 0)
    host.user = User("root", 0, False, True)
    assert "outside this user namespace" in answer(host, "userfaultfd").found


def test_where_a_filter_kills_the_device_is_no_way_out(host: PlayedHost) -> None:
    """farmem tries the system call first, and would be killed for it."""
    host.filtered()
    host.userfaultfd = refused(KILLED, KILLED)
    assert "/dev/userfaultfd" not in mends(answer(host, "userfaultfd"))
    host.userfaultfd = refused(errno.EPERM, errno.EPERM)
    assert "/dev/userfaultfd" in mends(answer(host, "userfaultfd"))


def device(host: PlayedHost, monkeypatch: pytest.MonkeyPatch, mode: int, gid: int) -> None:
    status = os.stat_result((stat.S_IFCHR | mode, 0, 0, 1, 0, gid, 0, 0, 0, 0))
    monkeypatch.setattr(host, "status_of", lambda path: status)
    host.userfaultfd = refused(errno.EPERM, 0)


def test_the_group_of_the_device_is_named(
    host: PlayedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SimpleNamespace(gr_name="farmers", gr_mem=[])
    monkeypatch.setattr(grp, "getgrgid", lambda gid: group)
    device(host, monkeypatch, 0o660, 777)
    found = answer(host, "userfaultfd_device")
    assert found.mark == Mark.MISSING
    assert "crw-rw---- root:farmers: EACCES for user ann" in found.found
    assert mends(found) == "sudo usermod -aG farmers ann, then log in again"
    group.gr_mem.append("ann")
    found = answer(host, "userfaultfd_device")
    assert mends(found) == "log in again: ann is in group farmers, but this session is not"


def test_a_group_without_a_name_gets_one(host: PlayedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    device(host, monkeypatch, 0o660, 64123)
    mend = mends(answer(host, "userfaultfd_device"))
    assert "sudo groupadd -g 64123 userfaultfd && sudo usermod -aG userfaultfd ann" in mend


@pytest.mark.parametrize(("mode", "gid"), [(0o600, 0), (0o660, 0), (0o640, 777), (0o600, 777)])
def test_a_device_that_is_roots_alone_needs_a_group(
    host: PlayedHost, monkeypatch: pytest.MonkeyPatch, mode: int, gid: int
) -> None:
    device(host, monkeypatch, mode, gid)
    mend = mends(answer(host, "userfaultfd_device"))
    assert "chgrp userfaultfd /dev/userfaultfd" in mend
    assert "chmod 660 /dev/userfaultfd" in mend


def test_a_device_that_a_container_lacks_is_to_be_passed_in(host: PlayedHost) -> None:
    host.take(DEVICE)
    host.userfaultfd = refused(errno.EPERM, errno.EPERM, errno.ENOENT)
    found = answer(host, "userfaultfd_device")
    assert (found.mark, found.mend) == (Mark.MISSING, ())
    host.write("/.dockerenv", "")
    assert "--device /dev/userfaultfd" in mends(answer(host, "userfaultfd_device"))


def test_a_device_that_the_cgroup_refuses_is_to_be_passed_in(host: PlayedHost) -> None:
    host.userfaultfd = refused(errno.EPERM, errno.EPERM, errno.EPERM)
    assert "--device /dev/userfaultfd" in mends(answer(host, "userfaultfd_device"))


def test_a_device_that_is_not_needed_is_nothing_to_mend(host: PlayedHost) -> None:
    host.userfaultfd = FULL._replace(device_errno=errno.EACCES)
    found = answer(host, "userfaultfd_device")
    assert (found.mark, found.mend) == (Mark.OK, ())
    assert "not needed" in found.found
    host.take(DEVICE)
    assert answer(host, "userfaultfd_device").mark == Mark.WARNING


def test_the_setting_is_judged_by_whether_it_stands_in_the_way(host: PlayedHost) -> None:
    assert answer(host, "unprivileged_userfaultfd").mark == Mark.OK
    host.userfaultfd = refused(errno.EPERM, 0)
    found = answer(host, "unprivileged_userfaultfd")
    assert found.mark == Mark.WARNING
    assert mends(found) == "sudo sysctl vm.unprivileged_userfaultfd=1"
    host.shows_settings_read_only = True  # as in a container
    assert mends(answer(host, "unprivileged_userfaultfd")).startswith("on the host: sudo")
    host.write(SYSCTL, "1")
    assert answer(host, "unprivileged_userfaultfd").mark == Mark.OK
    host.take(SYSCTL)
    assert answer(host, "unprivileged_userfaultfd").mark == Mark.OK


FEATURES = {
    "uffd_wp": "WP",
    "uffd_event_remap": "EVENT_REMAP",
    "uffd_event_remove": "EVENT_REMOVE",
    "uffd_event_unmap": "EVENT_UNMAP",
    "uffd_move": "MOVE",
    "uffd_poison": "POISON",
    "uffd_wp_async": "WP_ASYNC",
    "uffd_sigbus": "SIGBUS",
}


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_is_looked_at_by_itself(host: PlayedHost, name: str) -> None:
    bit = getattr(_native.lib, f"FM_PROBE_FEATURE_{FEATURES[name]}")
    assert answer(host, name).mark == Mark.OK
    host.userfaultfd = FULL._replace(features=ALL_FEATURES & ~bit)
    assert [other for other in FEATURES if answer(host, other).mark != Mark.OK] == [name]
    assert "use Linux" in mends(answer(host, name))
    host.userfaultfd = FULL._replace(features=bit)
    assert answer(host, name).mark == Mark.OK


def test_without_move_the_other_way_is_told(host: PlayedHost) -> None:
    """As on Debian 12: farmem runs there if the user vouches for the program."""
    host.userfaultfd = FULL._replace(features=0xFFFF)
    found = answer(host, "uffd_move")
    assert found.mark == Mark.MISSING
    assert "--no-pinned-io" in mends(found)
    group = next(group for group in GROUPS if CHECKS["uffd_move"] in group.checks)
    assert group.name == "cases"
