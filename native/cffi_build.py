"""Emits the C source of farmem._native (cffi, API mode) from our own headers.

The headers are the only place where a layout is written down: what lies between
"cdef begins" and "cdef ends" goes to cffi as it is, and the C compiler checks it
against the header itself.  Run by CMake; touches nothing but its output file.
"""

import re
import sys
from pathlib import Path

import cffi

CDEF = re.compile(r"/\* cdef begins \*/(.*?)/\* cdef ends \*/", re.DOTALL)


def cdef_of(header: Path) -> str:
    """The declarations of a header that Python is to see."""
    found = CDEF.findall(header.read_text())
    if not found:
        sys.exit(f"{header}: no part between '/* cdef begins */' and '/* cdef ends */'")
    return "".join(found)


def main(output: str, *headers: str) -> None:
    """Write the C source for the headers to the output file."""
    ffi = cffi.FFI()
    for header in headers:
        ffi.cdef(cdef_of(Path(header)))
    includes = "".join(f'#include "{Path(header).name}"\n' for header in headers)
    ffi.set_source("farmem._native", includes)
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
