"""A host for the doctor's tests, played: its files lie below a folder, and what the kernel
would answer is said beforehand.  It has everything, until a test takes something away.
"""

import errno
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from farmem.doctor import GROUPS
from farmem.doctor.findings import Answer, look
from farmem.doctor.host import NO_LIMIT, Host, Ran, User, Userfaultfd

CHECKS = {check.name: check for group in GROUPS for check in group.checks}
GIB = 1 << 30
ALL_FEATURES = (1 << 17) - 1
FULL = Userfaultfd("system call", ALL_FEATURES, 0, 0, 0)
SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"
DEVICE = "/dev/userfaultfd"


class PlayedHost(Host):
    """An x86-64 host with everything, until a test takes something away."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.calls: dict[str, int] = {}
        self.userfaultfd = FULL
        self.user = User("ann", 1000, False, False)
        self.release, self.machine, self.libc_name = "6.12.0-played", "x86_64", "glibc 2.36"
        self.environ: dict[str, str] = {}
        self.limits: dict[str, tuple[int, int]] = {}
        self.memory = (16 * GIB, 8 * GIB, 0)
        self.threads = 10
        self.shows_settings_read_only = False
        self.modules: set[str] = set()
        self.ran = Ran(0, "", "")
        self.write("/proc/self/status", "Seccomp:\t0\nSeccomp_filters:\t0\n")
        self.write(SYSCTL, "0")
        self.write(DEVICE, "")

    def write(self, path: str, text: str) -> Path:
        file = self.folder / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def take(self, path: str) -> None:
        (self.folder / path.lstrip("/")).unlink()

    def filtered(self) -> None:
        self.write("/proc/self/status", "Seccomp:\t2\nSeccomp_filters:\t1\n")

    def is_read_only(self, path: str) -> bool:
        return self.shows_settings_read_only and path == "/proc/sys"

    def call(self, name: str) -> int:
        return self.calls.get(name, 0)

    def uname(self) -> Any:
        return SimpleNamespace(release=self.release, machine=self.machine)

    def libc(self) -> str:
        return self.libc_name

    def environment(self) -> Mapping[str, str]:
        return self.environ

    def limit(self, name: str) -> tuple[int, int]:
        return self.limits.get(name, (NO_LIMIT, NO_LIMIT))

    def memory_bytes(self) -> tuple[int, int, int]:
        return self.memory

    def threads_of_user(self) -> int:
        return self.threads

    def has_module(self, name: str) -> bool:
        return name in self.modules

    def python(
        self,
        code: str,
        *words: str,
        environment: Mapping[str, str] | None = None,
        limit_seconds: float = 0,
    ) -> Ran:
        del code, words, environment, limit_seconds
        return self.ran


def answer(host: Host, name: str) -> Answer:
    return look(CHECKS[name], host)


def mends(found: Answer) -> str:
    return " | ".join(found.mend)


def refused(why: int, user_mode: int, device: int = errno.EACCES) -> Userfaultfd:
    features = ALL_FEATURES if user_mode == 0 else None
    return Userfaultfd("none", features, why, device, user_mode)
