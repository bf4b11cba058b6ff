"""The few facts about an ELF file that decide whether it can be taken over.

Reads headers, the dynamic section and the tables of symbol names; runs nothing and
changes nothing.  What the facts mean is for checks.py to say.
"""

import os
import struct
from typing import NamedTuple

ELF_MAGIC = b"\x7fELF"
BITS_64 = 2
LITTLE_ENDIAN = 1

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 1, 5, 10
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SHT_SYMTAB = 2
_READ_BYTES_MAX = 64 << 20


class Elf(NamedTuple):
    """What is known of an ELF file; all is empty where it is not a 64-bit one."""

    is_64_bit: bool
    machine: int
    interpreter: str
    needed: tuple[str, ...]
    names: bytes

    def has_symbol(self, name: bytes) -> bool:
        """Whether a symbol of this name is defined or wanted, as far as it was not stripped."""
        return b"\0" + name + b"\0" in self.names


class _Header(NamedTuple):
    kind: int
    machine: int
    version: int
    entry: int
    segments: int
    sections: int
    flags: int
    header_bytes: int
    segment_bytes: int
    segment_count: int
    section_bytes: int
    section_count: int
    names_section: int


class _Segment(NamedTuple):
    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    file_bytes: int
    memory_bytes: int
    align: int


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size_bytes: int
    link: int
    info: int
    align: int
    entry_bytes: int


class BadElf(ValueError):
    """The file starts like an ELF file and is not a whole one."""


def _read_at(fd: int, offset: int, size_bytes: int) -> bytes:
    if size_bytes > _READ_BYTES_MAX:
        raise BadElf("a part is too large")
    data = os.pread(fd, size_bytes, offset)
    if len(data) != size_bytes:
        raise BadElf("it ends early")
    return data


def _segments(fd: int, header: _Header) -> list[_Segment]:
    table, entry_bytes, count = header.segments, header.segment_bytes, header.segment_count
    if entry_bytes != _SEGMENT.size:
        raise BadElf("its program headers have an unknown size")
    data = _read_at(fd, table, count * entry_bytes)
    return [_Segment(*values) for values in _SEGMENT.iter_unpack(data)]


def _symbol_names(fd: int, header: _Header) -> bytes:
    """The names that a debugger sees: a runtime that is linked in statically is only there.

    Sections are for tools: where they are missing, damaged or huge, we do without.
    """
    table, entry_bytes, count = header.sections, header.section_bytes, header.section_count
    if entry_bytes != _SECTION.size:
        return b""
    try:
        data = _read_at(fd, table, count * entry_bytes)
        sections = [_Section(*values) for values in _SECTION.iter_unpack(data)]
        for section in sections:
            if section.kind == _SHT_SYMTAB and section.link < count:
                strings = sections[section.link]
                return _read_at(fd, strings.offset, strings.size_bytes)
    except BadElf:
        pass
    return b""


def _strings(fd: int, segments: list[_Segment], dynamic: list[tuple[int, int]]) -> bytes:
    tags = dict(dynamic)
    address, size_bytes = tags.get(_DT_STRTAB), tags.get(_DT_STRSZ)
    if address is None or size_bytes is None:
        return b""
    for segment in segments:
        inside = address - segment.address
        if segment.kind == _PT_LOAD and 0 <= inside < segment.file_bytes:
            return _read_at(fd, segment.offset + inside, size_bytes)
    raise BadElf("its dynamic strings lie in no segment")


def read_elf(fd: int) -> Elf:
    """The facts about an open ELF file; BadElf where it is damaged."""
    ident = _read_at(fd, 0, 16)
    if ident[4] != BITS_64 or ident[5] != LITTLE_ENDIAN:
        return Elf(False, 0, "", (), b"")
    header = _Header(*_HEADER.unpack(_read_at(fd, 0, _HEADER.size)))
    segments = _segments(fd, header)
    interpreter, dynamic = "", list[tuple[int, int]]()
    for segment in segments:
        if segment.kind == _PT_INTERP:
            raw = _read_at(fd, segment.offset, segment.file_bytes)
            interpreter = raw.rstrip(b"\0").decode(errors="replace")
        elif segment.kind == _PT_DYNAMIC:
            whole = segment.file_bytes // _DYNAMIC.size * _DYNAMIC.size
            dynamic = list(_DYNAMIC.iter_unpack(_read_at(fd, segment.offset, whole)))
    strings = _strings(fd, segments, dynamic)
    needed = tuple(
        strings[value : strings.index(b"\0", value)].decode(errors="replace")
        for tag, value in dynamic
        if tag == _DT_NEEDED and b"\0" in strings[value:]
    )
    return Elf(True, header.machine, interpreter, needed, strings + _symbol_names(fd, header))
