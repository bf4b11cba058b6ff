"""The engine in this process, as the Python API sees it: one table of functions in C.

The library is the one that `farmem run` has preloaded, else it is loaded here, once, and
stays.  A call may wait for the pool; the interpreter's lock is free meanwhile, and signals
are looked at ten times a second.  Nothing here decides anything.
"""

import os
from typing import Any

from farmem import _native, checks
from farmem.errors import FarmemError
from farmem.job import DEFECTS_VARIABLE, JOB_VARIABLE

ffi, lib = _native.ffi, _native.lib

PAGE_BYTES: int = lib.FM_PAGE_BYTES


class Engine:
    """The engine's functions; start() comes before all others."""

    def __init__(self) -> None:
        why = ffi.new("const char **")
        path = checks.library_path()
        self._api: Any = lib.fm_engine_api(os.fsencode(path), why)
        if self._api == ffi.NULL:
            words = ffi.string(why[0]).decode(errors="replace") if why[0] != ffi.NULL else path
            raise FarmemError(f"the engine can't be loaded: {words}", "install farmem again")
        if self._api.version != lib.FM_CONTROL_VERSION:
            raise FarmemError(
                "the engine in this process is another version's",
                "run this program with the `farmem run` of the farmem that it imports",
            )
        self._mode: int = lib.FM_REGION_MODE_NONE

    def start(self, job: str = "") -> bool:
        """Join the job NAME:TOKEN; without one only find out whether that was done."""
        defects = os.environb.get(DEFECTS_VARIABLE)
        self._mode = self._api.start(job.encode() if job else ffi.NULL, defects or ffi.NULL)
        return bool(self._mode != lib.FM_REGION_MODE_NONE)

    def start_inherited(self) -> bool:
        """Join the job that this program was started in; False: it was not."""
        if self.start():
            return True
        job = os.environb.get(JOB_VARIABLE, b"").decode(errors="replace")
        if job and not self.start(job):
            raise FarmemError(
                "the farmem job that this program was started in can't be joined (any more)",
                f"start it again under `farmem run`, or without {os.fsdecode(JOB_VARIABLE)}",
            )
        return bool(job)

    @property
    def manages_all(self) -> bool:
        """`farmem run` started this program: all its memory is managed, not regions alone."""
        return bool(self._mode == lib.FM_REGION_MODE_PROGRAM)

    @property
    def control(self) -> Any:
        """The job's control segment."""
        control = self._api.control()
        if control == ffi.NULL:
            raise FarmemError("the engine has ended in this process", "start the program again")
        return control

    def counters(self) -> dict[str, int]:
        """What has been counted of this process so far; the names of --stats."""
        counters = self.control.procs[self._api.slot()].counters
        names = [name for name, _ in ffi.typeof("struct fm_counters").fields]
        return {name: getattr(counters, name) for name in names}

    def call(self, kind: int, start: int = 0, size_bytes: int = 0, value: int = 0) -> Any:
        """Have something done (enum fm_region_kind); how it went is in the answer."""
        call = ffi.new(
            "struct fm_region_call *",
            {"kind": kind, "start": start, "bytes": size_bytes, "value": value},
        )
        while True:
            self._api.call(call)
            if call.answer != lib.FM_REGION_MORE:
                return call


def address_of(buffer: Any) -> int:
    """Where a buffer lies, without holding on to it."""
    with ffi.from_buffer(buffer) as pointer:
        return int(ffi.cast("uintptr_t", pointer))
