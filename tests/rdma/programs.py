"""The programs that run.py and wire.py run in guests: the host makes them, and their input.

There it would take minutes.  Nothing here knows pyverbs, which only a guest has.
"""

from __future__ import annotations

import base64
import hashlib
import random
from pathlib import Path

from tests import harness
from tests.guest.cases import SAFETY

VERIFY = next(case for case in SAFETY if case.name == "verify")
FORKS = next(case for case in SAFETY if case.name == "forks_child")

# sed keeps all lines that it reads, and writes them at the end: all of its memory goes out and
# comes back once, in order. The text is a little more than four times the smallest budget there is.
TEXT = harness.BUILD / "text"
LINE_BYTES, LINES = 1 << 10, 65 << 10
SED = ("sed", "-n", "H;${x;p}", str(TEXT))


def text() -> bytes:
    """The same each time."""
    source = random.Random(4)
    some = [base64.b64encode(source.randbytes(LINE_BYTES * 3 // 4)) for _ in range(1 << 10)]
    return b"".join(b"%s\n" % source.choice(some) for _ in range(LINES))


def sed_digest() -> str:
    """Of what sed writes: the first line is put behind an empty one."""
    return hashlib.sha256(b"\n" + text()).hexdigest()


def make_all() -> None:
    for case in (VERIFY, FORKS):
        case.program()
    harness.BUILD.mkdir(parents=True, exist_ok=True)
    fresh = Path(f"{TEXT}.fresh")
    fresh.write_bytes(text())
    fresh.rename(TEXT)
