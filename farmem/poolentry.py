"""What the engines are told of a pool's server: a struct fm_pool_server of the control segment.

Filled in by whoever knows where the server is, before an engine looks; afterwards one word of it
changes here, when the lease ends.
"""

import os
from typing import Any, NamedTuple

from farmem import _native
from farmem.servers import NAME_BYTES_MAX

ffi, lib = _native.ffi, _native.lib


class Way(NamedTuple):
    """How an engine gets there."""

    kind: int
    address: bytes  # a struct sockaddr
    export: bytes


def fill_entry(there: Any, name: str, way: Way, timeout_ns: int) -> None:
    """Say where a server is, and what messages call it."""
    there.timeout_ns = timeout_ns
    there.address_bytes, there.export_bytes = len(way.address), len(way.export)
    ffi.memmove(there.address, way.address, len(way.address))
    ffi.memmove(there.export_name, way.export, len(way.export))
    called = os.fsencode(name)[:NAME_BYTES_MAX]
    ffi.memmove(there.name, called, len(called))
    there.kind = way.kind


def end_entry(there: Any, how: int) -> None:
    """The lease has ended: the engines need not wait for what does not come."""
    lib.fm_word_swap(ffi.addressof(there, "gone"), 0, how)
