"""What is refused before the command starts: programs, and kernels that can't be honest.

Programs are compiled, or real ones are patched by a few bytes; the userfaultfd that a
machine does not have is played by a stand-in for the probe.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farmem import _native, checks
from farmem.errors import FarmemError

SEARCH = "/usr/local/bin:/usr/bin:/bin"
MACHINE = checks.machine_of(checks.library_path())
TRUE = os.path.realpath(shutil.which("true") or "/bin/true")


def refusal(path: Path | str) -> FarmemError:
    with pytest.raises(FarmemError) as caught:
        checks.check_program(str(path), SEARCH, MACHINE)
    assert caught.value.hint
    return caught.value


def compiled(folder: Path, *flags: str) -> Path:
    source, program = folder / "program.c", folder / "program"
    source.write_text("int main(void) { return 0; }\n")
    subprocess.run(["cc", *flags, "-o", program, source], check=True)
    return program


def patched(folder: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(Path(TRUE).read_bytes())
    change(data)
    path = folder / "patched"
    path.write_bytes(data)
    path.chmod(0o755)
    return path


def test_an_ordinary_program_passes(tmp_path: Path) -> None:
    checks.check_program(TRUE, SEARCH, MACHINE)
    checks.check_program(str(compiled(tmp_path)), SEARCH, MACHINE)


@pytest.mark.parametrize("flags", [["-static"], ["-static-pie"]])
def test_a_static_program_is_refused(tmp_path: Path, flags: list[str]) -> None:
    error = refusal(compiled(tmp_path, *flags))
    assert "statically linked" in error.what
    assert error.status == 125


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["-fsanitize=address"], "ASan"),
        (["-fsanitize=address", "-static-libasan"], "ASan"),
        (["-fsanitize=thread"], "TSan"),
    ],
)
def test_a_sanitized_program_is_refused(tmp_path: Path, flags: list[str], name: str) -> None:
    assert f"built with {name}" in refusal(compiled(tmp_path, *flags)).what


@pytest.mark.parametrize(("mode", "word"), [(0o4755, "set-uid"), (0o2755, "set-gid")])
def test_a_privileged_program_is_refused(tmp_path: Path, mode: int, word: str) -> None:
    program = tmp_path / "true"
    shutil.copy(TRUE, program)
    program.chmod(mode)
    assert word in refusal(program).what


@pytest.mark.root
def test_a_program_with_file_capabilities_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "true"
    shutil.copy(TRUE, program)
    # cap_net_raw+ep in the version 2 layout of <linux/capability.h>.
    os.setxattr(program, "security.capability", bytes.fromhex("010000020020" + "00" * 14))
    assert "file capabilities" in refusal(program).what


def test_a_32_bit_program_is_refused(tmp_path: Path) -> None:
    def make_32_bit(data: bytearray) -> None:
        data[4] = 1

    assert "32-bit" in refusal(patched(tmp_path, make_32_bit)).what


def test_a_program_for_another_processor_is_refused(tmp_path: Path) -> None:
    def make_foreign(data: bytearray) -> None:
        data[18:20] = b"\xf3\x00"  # RISC-V

    assert "another processor" in refusal(patched(tmp_path, make_foreign)).what


def with_interpreter(name: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        start = data.index(b"/lib64/ld-linux")
        end = data.index(b"\0", start)
        data[start:end] = name.ljust(end - start, b"\0")

    return change


def test_a_musl_program_is_refused(tmp_path: Path) -> None:
    assert "musl" in refusal(patched(tmp_path, with_interpreter(b"/lib/ld-musl-x86.so.1"))).what


def test_a_program_whose_loader_is_missing_is_not_found(tmp_path: Path) -> None:
    error = refusal(patched(tmp_path, with_interpreter(b"/nosuch/ld.so")))
    assert "/nosuch/ld.so" in error.what
    assert error.status == 127


@pytest.mark.parametrize("kept_bytes", [4, 20, 64, 300])
def test_a_damaged_program_is_refused(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(Path(TRUE).read_bytes()[:kept_bytes])
    path.chmod(0o755)
    assert refusal(path).status == 126


def script(folder: Path, first_line: str) -> Path:
    path = folder / "script"
    path.write_text(f"{first_line}\necho hello\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "line", ["#!/bin/sh", "#! /bin/sh -e", "#!/usr/bin/env sh", "echo no line"]
)
def test_a_script_with_an_ordinary_interpreter_passes(tmp_path: Path, line: str) -> None:
    checks.check_program(str(script(tmp_path, line)), SEARCH, MACHINE)


@pytest.mark.parametrize("through", ["{}", "/usr/bin/env {}"])
def test_a_script_whose_interpreter_is_static_is_refused(tmp_path: Path, through: str) -> None:
    program = compiled(tmp_path, "-static")
    path = script(tmp_path, "#!" + through.format(program))
    assert f"{program} is statically linked" in refusal(path).what


def test_a_script_whose_interpreter_is_missing_is_not_found(tmp_path: Path) -> None:
    assert refusal(script(tmp_path, "#!/nosuch/interpreter")).status == 127


def test_a_script_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    path = script(tmp_path, f"#!{tmp_path}/script")
    assert refusal(path).status == 126


def test_a_command_is_found_as_execvp_finds_it(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "tool").write_text("x")
    (second / "tool").chmod(0o755)
    search = f"{first}:{second}"
    assert checks.find_command("tool", search) == str(second / "tool")
    assert checks.find_command(str(second / "tool"), "") == str(second / "tool")


def test_a_command_that_is_not_there_says_so_with_the_shells_status(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name, status in [("plain", 126), (".", 126), ("nosuch", 127), ("link", 127)]:
        with pytest.raises(FarmemError) as caught:
            checks.find_command(f"{tmp_path}/{name}", "")
        assert caught.value.status == status
    with pytest.raises(FarmemError) as caught:
        checks.find_command("", str(tmp_path))
    assert caught.value.status == 127


def test_a_budget_below_what_is_workable_is_refused() -> None:
    checks.check_budget(16 << 20)
    with pytest.raises(FarmemError, match="too small"):
        checks.check_budget((16 << 20) - 1)


def test_a_statistics_path_that_can_not_be_replaced_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "stats.json"
    assert checks.check_stats_path(str(good)) == str(good)
    good.write_text("old")
    assert checks.check_stats_path(str(good)) == str(good)
    for bad in ("/dev/null", str(tmp_path), str(tmp_path / "no" / "stats.json")):
        with pytest.raises(FarmemError):
            checks.check_stats_path(bad)


def probe_finds(monkeypatch: pytest.MonkeyPatch, **found: int) -> None:
    """Let the probe find something else than this machine has."""

    def fill(probe: Any) -> None:
        for name, value in found.items():
            setattr(probe, name, value)

    lib = SimpleNamespace(
        fm_probe_userfaultfd=fill,
        FM_UFFD_NONE=_native.lib.FM_UFFD_NONE,
        FM_UFFD_USER_MODE=_native.lib.FM_UFFD_USER_MODE,
        FM_PROBE_FEATURE_MOVE=_native.lib.FM_PROBE_FEATURE_MOVE,
    )
    monkeypatch.setattr(checks, "_native", SimpleNamespace(ffi=_native.ffi, lib=lib))


def test_user_mode_faults_only_are_refused_because_they_are_not_honest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe_finds(monkeypatch, user_mode_only=1, syscall_errno=errno.EPERM, device_errno=errno.EACCES)
    with pytest.raises(FarmemError, match="honestly") as caught:
        checks.check_userfaultfd(no_pinned_io=False)
    assert "vm.unprivileged_userfaultfd=1" in caught.value.hint
    assert "/dev/userfaultfd" in caught.value.hint


def test_user_mode_faults_are_enough_for_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    features = _native.lib.FM_PROBE_FEATURE_MOVE
    probe_finds(monkeypatch, user_mode_only=1, syscall_errno=errno.EPERM, features=features)
    access = checks.check_userfaultfd(no_pinned_io=False, for_regions=True)
    assert access.way == _native.lib.FM_UFFD_USER_MODE and access.has_move
    probe_finds(monkeypatch, user_mode_only=1, syscall_errno=errno.EPERM)
    with pytest.raises(FarmemError, match="UFFDIO_MOVE") as caught:
        checks.check_userfaultfd(no_pinned_io=False, for_regions=True)
    assert "no_pinned_io=True" in caught.value.hint
    probe_finds(monkeypatch, syscall_errno=errno.EPERM, device_errno=errno.ENOENT)
    with pytest.raises(FarmemError, match="no permission"):
        checks.check_userfaultfd(no_pinned_io=False, for_regions=True)


def test_no_permission_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_finds(monkeypatch, syscall_errno=errno.EPERM, device_errno=errno.ENOENT)
    with pytest.raises(FarmemError, match="no permission") as caught:
        checks.check_userfaultfd(no_pinned_io=False)
    assert "seccomp" in caught.value.hint


def test_a_kernel_without_userfaultfd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_finds(monkeypatch, syscall_errno=errno.ENOSYS, device_errno=errno.ENOENT)
    with pytest.raises(FarmemError, match="has no userfaultfd"):
        checks.check_userfaultfd(no_pinned_io=True)


def test_a_kernel_without_move_needs_the_users_word(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_finds(monkeypatch, way=_native.lib.FM_UFFD_SYSCALL, features=0xFFFF)
    with pytest.raises(FarmemError, match="UFFDIO_MOVE") as caught:
        checks.check_userfaultfd(no_pinned_io=False)
    assert "--no-pinned-io" in caught.value.hint
    assert checks.check_userfaultfd(no_pinned_io=True).has_move is False


@pytest.mark.root
def test_an_ordinary_user_gets_what_the_system_grants() -> None:
    """In a child that becomes nobody: refused, unless the system opens userfaultfd to all."""
    is_open = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    device = Path("/dev/userfaultfd")
    is_open = is_open or (device.exists() and bool(device.stat().st_mode & 0o002))
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            checks.check_userfaultfd(no_pinned_io=True)
            status = 0
        except FarmemError:
            status = 1
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if is_open else 1)
