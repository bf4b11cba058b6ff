"""What is refused before the command is started: better a clear sentence than half a job.

Looks at files and asks the kernel what it allows; changes nothing.  Each refusal names
what was wrong and what to type instead.  Imported on the way to exec: standard library
and the extension only.
"""

import errno
import os
import resource
import stat
from typing import Any, NamedTuple

from farmem import _native
from farmem.elf import ELF_MAGIC, BadElf, Elf, read_elf
from farmem.errors import EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, FarmemError
from farmem.sizes import format_bytes

BUDGET_BYTES_MIN = 16 << 20
DESCRIPTORS_MIN = 16
SCRIPT_DEPTH_MAX = 4
_SCRIPT_LINE_BYTES = 256  # what the kernel reads of a #! line
_SANITIZER_SYMBOLS = {
    b"__asan_init": "ASan",
    b"__hwasan_init": "HWASan",
    b"__lsan_init": "LSan",
    b"__msan_init": "MSan",
    b"__tsan_init": "TSan",
}
_SANITIZER_LIBRARIES = ("asan", "hwasan", "lsan", "msan", "tsan")


class Access(NamedTuple):
    """How a userfaultfd can be had here."""

    way: int
    has_move: bool


def library_path() -> str:
    """Where libfarmem.so lies: beside the extension."""
    path = os.path.join(os.path.dirname(_native.__file__), "libfarmem.so")
    if not os.path.exists(path):
        raise FarmemError(f"{path} is missing", "install farmem again: pip install farmem")
    if any(separator in path for separator in (":", " ")):
        raise FarmemError(
            f"LD_PRELOAD can't name {path!r}: it holds a space or a colon",
            "install farmem under another path",
        )
    return path


def machine_of(path: str) -> int:
    """The processor that an ELF file is built for: our own library's is the one we can serve."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _elf_of(path, fd).machine
    finally:
        os.close(fd)


def check_budget(budget_bytes: int, example: str = "farmem run -m 16M -- CMD") -> None:
    """A budget must leave room for a program's start, its stacks and our staging."""
    if budget_bytes < BUDGET_BYTES_MIN:
        raise FarmemError(
            f"a budget of {format_bytes(budget_bytes)} is too small to work in",
            f"give at least {format_bytes(BUDGET_BYTES_MIN)}: {example}",
        )


def check_descriptors() -> None:
    """The job's memory and its supervisor need some descriptors for themselves for a moment."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = limit - len(os.listdir("/proc/self/fd"))
    if left < DESCRIPTORS_MIN:
        raise FarmemError(
            f"only {max(left, 0)} more files may be open here, and farmem needs {DESCRIPTORS_MIN}",
            "raise the limit: ulimit -n 1024",
        )


def check_stats_path(path: str) -> str:
    """The file that --stats will replace, resolved; an error where it can't be written."""
    resolved = os.path.realpath(path)
    hint = "name a file in a folder that you may write to: --stats stats.json"
    if os.path.lexists(resolved) and not os.path.isfile(resolved):
        raise FarmemError(f"--stats {path!r} is not a regular file", hint)
    folder = os.path.dirname(resolved)
    if not os.path.isdir(folder):
        raise FarmemError(f"--stats {path!r}: there is no folder {folder!r}", hint)
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise FarmemError(f"--stats {path!r}: the folder {folder!r} can't be written to", hint)
    return resolved


def find_command(name: str, search: str) -> str:
    """The file that execvp would run, or an error with the shell's exit status."""
    if not name:
        raise FarmemError("the command is an empty word", "name a program", EXIT_NOT_FOUND)
    if "/" in name:
        candidates = [name]
    else:
        candidates = [os.path.join(folder or ".", name) for folder in search.split(":")]
    refused = ""
    for path in candidates:
        if os.path.isfile(path) and os.access(path, os.X_OK, effective_ids=True):
            return path
        if os.path.lexists(path) and not refused:
            refused = path
    if not refused:
        where = "" if "/" in name else " in PATH"
        raise FarmemError(
            f"{name}: command not found{where}", "check the name, or give its path", EXIT_NOT_FOUND
        )
    if os.path.isdir(refused):
        what, hint = "is a folder", "name a program in it"
    elif not os.path.exists(refused):
        raise FarmemError(
            f"{refused}: a link that leads nowhere", "check where it points", EXIT_NOT_FOUND
        )
    else:
        what, hint = "may not be executed", f"if it is a program: chmod +x {refused}"
    raise FarmemError(f"{refused} {what}", hint, EXIT_NOT_EXECUTABLE)


def check_program(path: str, search: str, machine: int, depth: int = 0) -> None:
    """Refuse a program that can't be taken over; follow a script to its interpreter."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FarmemError(
            f"{path} can't be read, so it can't be checked: {error.strerror}",
            f"run it without farmem, or make it readable: chmod a+r {path}",
        ) from error
    try:
        head = os.pread(fd, _SCRIPT_LINE_BYTES, 0)
        if head.startswith(ELF_MAGIC):
            _check_privileges(path, fd)
            _check_elf(path, _elf_of(path, fd), machine)
        elif head.startswith(b"#!"):
            _check_script(path, head, search, machine, depth)
        # Else the kernel, or a shell, will know what it is: see launch in job.py.
    finally:
        os.close(fd)


def _elf_of(path: str, fd: int) -> Elf:
    try:
        return read_elf(fd)
    except BadElf as error:
        raise FarmemError(
            f"{path} is a damaged program: {error}", "build it again", EXIT_NOT_EXECUTABLE
        ) from error


def _check_privileges(path: str, fd: int) -> None:
    hint = "run it without farmem, or a copy of it without the privilege"
    mode = os.fstat(fd).st_mode
    if mode & stat.S_ISUID:
        raise FarmemError(f"{path} is set-uid: the loader ignores LD_PRELOAD for it", hint)
    if mode & stat.S_ISGID and mode & stat.S_IXGRP:
        raise FarmemError(f"{path} is set-gid: the loader ignores LD_PRELOAD for it", hint)
    try:
        os.getxattr(fd, "security.capability")
    except OSError:
        return
    raise FarmemError(f"{path} has file capabilities: the loader ignores LD_PRELOAD for it", hint)


def _check_elf(path: str, elf: Elf, machine: int) -> None:
    if not elf.is_64_bit or elf.machine != machine:
        kind = "a 32-bit program" if not elf.is_64_bit else "built for another processor"
        raise FarmemError(f"{path} is {kind}", f"run a 64-bit {os.uname().machine} build of it")
    if not elf.interpreter:
        raise FarmemError(
            f"{path} is statically linked: LD_PRELOAD does not reach it",
            "run a dynamically linked build of it, or run it without farmem",
        )
    if "ld-musl" in elf.interpreter:
        raise FarmemError(
            f"{path} is built for musl: libfarmem.so needs glibc", "run a glibc build of it"
        )
    if not os.path.exists(elf.interpreter):
        raise FarmemError(
            f"{path} needs the loader {elf.interpreter}, which is not here",
            "install the libraries that it was built for",
            EXIT_NOT_FOUND,
        )
    sanitizer = _sanitizer_of(elf)
    if sanitizer:
        raise FarmemError(
            f"{path} is built with {sanitizer}, which does not bear another library before it",
            "run a build without -fsanitize, or run it without farmem",
        )


def _sanitizer_of(elf: Elf) -> str:
    for symbol, name in _SANITIZER_SYMBOLS.items():
        if elf.has_symbol(symbol):
            return name
    for library in elf.needed:
        for name in _SANITIZER_LIBRARIES:
            if library.startswith((f"lib{name}.so", f"libclang_rt.{name}")):
                return _SANITIZER_SYMBOLS[f"__{name}_init".encode()]
    return ""


def _check_script(path: str, head: bytes, search: str, machine: int, depth: int) -> None:
    words = head[2:].split(b"\n", 1)[0].strip().split(None, 1)
    if not words or depth >= SCRIPT_DEPTH_MAX:
        what = "names no interpreter" if not words else "leads from script to script"
        raise FarmemError(f"{path}: its #! line {what}", "mend the line", EXIT_NOT_EXECUTABLE)
    interpreter = os.fsdecode(words[0])
    if not os.path.exists(interpreter):
        raise FarmemError(
            f"{path}: its interpreter {interpreter} was not found",
            "mend its #! line, or install the interpreter",
            EXIT_NOT_FOUND,
        )
    check_program(interpreter, search, machine, depth + 1)
    argument = os.fsdecode(words[1]).strip() if len(words) > 1 else ""
    plain = argument and not argument.startswith("-") and not set(argument) & set("= \t")
    if os.path.basename(interpreter) == "env" and plain:
        check_program(find_command(argument, search), search, machine, depth + 1)


def probe_userfaultfd() -> Any:
    """What the kernel says when it is asked for a userfaultfd: a struct fm_probe."""
    probe = _native.ffi.new("struct fm_probe *")
    _native.lib.fm_probe_userfaultfd(probe)
    return probe


def check_userfaultfd(no_pinned_io: bool, *, for_regions: bool = False) -> Access:
    """How a userfaultfd that sees every fault can be had; an error where it can't be honest.

    For regions, which are asked for, one that sees user-mode faults alone will do.
    """
    probe = probe_userfaultfd()
    way: int = probe.way
    if way == _native.lib.FM_UFFD_NONE and for_regions and probe.user_mode_only:
        way = _native.lib.FM_UFFD_USER_MODE
    if way == _native.lib.FM_UFFD_NONE:
        raise _no_userfaultfd(probe)
    has_move = bool(probe.features & _native.lib.FM_PROBE_FEATURE_MOVE)
    if not has_move and not no_pinned_io:
        raise FarmemError(
            f"this kernel ({os.uname().release}) has no UFFDIO_MOVE, so memory that a device "
            "is writing to can't be told from other memory",
            "use Linux 6.8 or newer; or, if the program does no O_DIRECT, io_uring or RDMA, "
            f"say so: {'no_pinned_io=True' if for_regions else '--no-pinned-io'}",
        )
    return Access(way, has_move)


def _no_userfaultfd(probe: Any) -> FarmemError:
    syscall_errno: int = probe.syscall_errno
    if syscall_errno == errno.ENOSYS:
        return FarmemError(
            "this kernel has no userfaultfd", "use a kernel with CONFIG_USERFAULTFD, 6.8 or newer"
        )
    hint = (
        "let the administrator type: sysctl vm.unprivileged_userfaultfd=1, or give your group "
        "access: chgrp GROUP /dev/userfaultfd && chmod g+rw /dev/userfaultfd"
    )
    if probe.user_mode_only:
        return FarmemError(
            "only user-mode faults can be had here: a system call that met a page in the pool "
            "would fail with EFAULT, so an unmodified program can't be run honestly",
            hint,
        )
    return FarmemError(
        f"no permission for userfaultfd ({os.strerror(syscall_errno)})",
        hint + "; in a container its seccomp profile must allow userfaultfd. "
        "What stands in the way here: farmem doctor",
    )
