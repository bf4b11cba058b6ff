"""Who belongs to a job and has not said so yet: a child whose parent has ended, on a busy machine.

Asked when the last process that is known has gone, and only then: it looks at every process of this
user.  Nothing is changed, and nobody is waited for here.
"""

import contextlib
import os

from farmem.job import JOB_VARIABLE

_LIBRARY = b"/libfarmem.so"


def on_the_way(name: str) -> bool:
    """Whether a live process bears the job's name in its environment, and has our library."""
    word = b"\0" + JOB_VARIABLE + b"=" + name.encode() + b":"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        # Others' processes can't be looked at, and one may end at any moment.
        with contextlib.suppress(OSError):
            if word in b"\0" + _read(pid, "environ") and _LIBRARY in _read(pid, "maps"):
                return True
    return False


def _read(pid: str, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()
