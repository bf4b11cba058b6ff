"""farmem itself: is it whole, and does it work?

The strongest check of all is a real run: a program that needs twice its budget,
waits until it has really been paged, and finds every byte right.
"""

import json
import os
import shutil
import sys
import tempfile
from typing import Any

from farmem.doctor.findings import Answer, Check, Mark, missing, ok, unknown
from farmem.doctor.host import Host, Ran

BUDGET = "16M"
POOL = "mem:128M"
MEMORY_BYTES = 24 << 20
LIMIT_SECONDS = 240.0  # a busy emulated machine takes a minute or two, others less than a second
PAGES_LEAST = 1000
_ENTRY = "import sys; from farmem.cli import main; sys.exit(main())"
_LOADED = """
import os, sys
maps = "/proc/self/maps"
sys.exit(os.path.exists(maps) and "libfarmem.so" not in open(maps).read())
"""
# The program of the trial: standard Python.  Every page has its own content.  It waits (not
# for ever) until what it has in memory is less than what it wrote; then it looks at all of
# it, writes some pages anew, and looks at those and their neighbours.
_PROGRAM = """
import sys, time
size = int(sys.argv[1])
count = size // 4096
def page(k, salt):
    return (k * 2654435761 + salt).to_bytes(8, "little") * 512
def put(k, salt):
    memory[k * 4096:(k + 1) * 4096] = page(k, salt)
def is_wrong(k, salt):
    return memory[k * 4096:(k + 1) * 4096] != page(k, salt)
def local():
    fields = open("/proc/self/statm").read().split()
    return (int(fields[1]) - int(fields[2])) * 4096
memory = bytearray(size)
for k in range(count):
    put(k, 1)
end = time.monotonic() + 20
while local() > size and time.monotonic() < end:
    time.sleep(0.005)
found = sum(is_wrong(k, 1) for k in range(count))
for k in range(0, count, 16):
    put(k, 2)
for k in range(0, count, 8):
    found += is_wrong(k, 2 if k % 16 == 0 else 1)
print("wrong pages:", found)
"""


def look_extension(host: Host) -> Answer:
    """The part of the package that is C."""
    del host
    from farmem import _native

    return ok("farmem._native can be imported", path=_native.__file__)


def look_library(host: Host) -> Answer:
    """libfarmem.so is there, and the loader takes it before a program."""
    from farmem import checks

    path = checks.library_path()
    ran = host.python(_LOADED, environment=_clean(host, LD_PRELOAD=path))
    if ran.status == 0 and "LD_PRELOAD" not in ran.err:  # the loader only complains of it
        return ok("libfarmem.so can be preloaded", path=path)
    return missing(
        f"{path} can't be preloaded: {ran.last_line()}",
        "install farmem again: pip install --force-reinstall farmem",
    )


def _clean(host: Host, **more: str) -> dict[str, str]:
    """The environment without anything of ours: the doctor may run in a job, or in a test."""
    kept = {
        name: value
        for name, value in host.environment().items()
        if not name.startswith("FARMEM_") and name != "LD_PRELOAD"
    }
    return {**kept, **more}


def _some_python() -> str:
    """A Python that this user may execute: our own, or the system's."""
    if os.access(sys.executable, os.X_OK):
        return sys.executable
    return shutil.which("python3") or ""


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return {}
    return found


def look_trial(host: Host) -> Answer:
    """Run a program with too little memory, and see."""
    from farmem import _native

    seen = host.userfaultfd
    if seen.way == "none":
        return unknown("not tried without userfaultfd")
    python = _some_python()
    if not python:
        return unknown("there is no python3 that this user may execute")
    has_move = bool((seen.features or 0) & _native.lib.FM_PROBE_FEATURE_MOVE)
    with tempfile.TemporaryDirectory(prefix="farmem-doctor-") as folder:
        path = os.path.join(folder, "stats.json")
        words = ["--config", os.devnull, "run", "-m", BUDGET, "--pool", POOL, "--stats", path]
        if not has_move:
            words.append("--no-pinned-io")
        program = [python, "-I", "-S", "-c", _PROGRAM, str(MEMORY_BYTES)]
        ran = host.python(
            _ENTRY, *words, "--", *program,
            environment=_clean(host), limit_seconds=LIMIT_SECONDS,
        )  # fmt: skip
        return verdict(ran, _read(path))


def verdict(ran: Ran, statistics: dict[str, Any]) -> Answer:
    """What came of the trial."""
    told = ran.last_line()
    see = f"farmem run -m {BUDGET} -- python3 -c 'b\"x\" * {MEMORY_BYTES}'"
    if ran.timed_out:
        return missing("the trial did not end in time", f"see whether this ends: {see}")
    if ran.status != 0:
        return missing(f"the trial failed: {told}", f"see what it says: {see}")
    if ran.out.strip() != "wrong pages: 0":
        found = f"the trial read wrong bytes ({ran.out.strip()})"
        return missing(found, "don't use farmem here, and tell its makers")
    evicted, fetched = (statistics.get(f"pages_{word}", 0) for word in ("evicted", "fetched"))
    if evicted < PAGES_LEAST or fetched < PAGES_LEAST:
        why = told if ran.err.strip() else "no reason was given"
        return missing(f"the trial ran but was not paged: {why}", f"see what it says: {see}")
    return Answer(
        Mark.OK,
        f"{evicted} pages out, {fetched} in, every byte right",
        values={"pages_evicted": evicted, "pages_fetched": fetched},
    )


REQUIRED = (
    Check("extension", "farmem's extension", look_extension),
    Check("library", "farmem's library", look_library),
    Check("trial", "a trial run", look_trial),
)


def look_numba(host: Host) -> Answer:
    """For the control plane to come."""
    if host.has_module("numba"):
        return ok("installed")
    return missing("not installed: nothing needs it yet", "pip install numba")


OPTIONAL = (Check("numba", "numba", look_numba),)
