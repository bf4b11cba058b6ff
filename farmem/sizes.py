"""Sizes, durations and shares as people write them, and bytes as people read them.

K, M, G and T are binary (1K is 1024): memory comes in such units.  512MB is refused,
because it means two things.  Standard library only; imported on the way to exec.
"""

import re
from decimal import Decimal

from farmem.errors import FarmemError

UNITS_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
UNITS_NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
BYTES_MAX = (1 << 63) - 1

_SIZE = re.compile(r"(?a:(\d+(?:\.\d+)?)([KMGT]?)(i?B)?)", re.IGNORECASE)
_DURATION = re.compile(r"(?a:(\d+(?:\.\d+)?)(ns|us|ms|s))")
_EXAMPLES = "write it as 512M, 4G, 1.5GiB or a plain number of bytes"


def parse_size(text: str, what: str = "size") -> int:
    """Bytes of a size such as 512M, 4G, 1.5GiB or 1048576."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise FarmemError(f"{what} {text!r} is not a size", _EXAMPLES)
    number, unit, suffix = match.group(1), match.group(2).upper(), match.group(3) or ""
    if unit and suffix.upper() == "B":
        raise FarmemError(
            f"{what} {text!r} could mean powers of 1000 or of 1024",
            f"write {number}{unit} or {number}{unit}iB (1{unit} is {UNITS_BYTES[unit]} bytes)",
        )
    if not unit and (suffix.upper() == "IB" or "." in number):
        raise FarmemError(f"{what} {text!r} is not a whole number of bytes", _EXAMPLES)
    size_bytes = int(Decimal(number) * UNITS_BYTES.get(unit, 1))
    if size_bytes > BYTES_MAX:
        raise FarmemError(f"{what} {text!r} is more than any machine can address", _EXAMPLES)
    return size_bytes


def parse_duration(text: str, what: str = "time") -> int:
    """Nanoseconds of a duration such as 10us or 1.5ms."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise FarmemError(f"{what} {text!r} is not a time", "write it as 500ns, 10us, 2ms or 1s")
    duration_ns = int(Decimal(match.group(1)) * UNITS_NS[match.group(2)])
    if duration_ns > BYTES_MAX:
        raise FarmemError(f"{what} {text!r} is too long", "write it as 500ns, 10us, 2ms or 1s")
    return duration_ns


def parse_chance_ppm(text: str, what: str = "chance") -> int:
    """Parts per million of a chance between 0 and 1."""
    try:
        chance = float(text)
    except ValueError:
        chance = -1.0
    if not 0.0 <= chance <= 1.0:
        raise FarmemError(f"{what} {text!r} is not a chance", "write it as 0.01: from 0 to 1")
    return round(chance * 1_000_000)


def format_bytes(size_bytes: int) -> str:
    """Bytes for a person to read: 1.2 GiB."""
    for unit in reversed(UNITS_BYTES):
        if size_bytes >= UNITS_BYTES[unit]:
            return f"{size_bytes / UNITS_BYTES[unit]:.1f} {unit}iB"
    return f"{size_bytes} bytes"
