"""--filter as people write it, and as the control segment holds it.

NAME[:key=value,...]: `delay:rtt=10us,bandwidth=1G`, `error:fetch=0.01,file=/tmp/armed`,
`checksum`, `stats`.  The first on the command line is the outermost.  What a filter
does is the data plane's; here is only its spelling.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from farmem.errors import FarmemError
from farmem.sizes import parse_chance_ppm, parse_duration, parse_size

FILTERS_MAX = 8
PATH_BYTES_MAX = 183
SEED_MAX = (1 << 64) - 1


class Filter(NamedTuple):
    """A filter with its parameters in the order of fm_filter_config.params."""

    name: str
    params: tuple[int, ...]
    path: str
    text: str


def _parse_bandwidth(text: str, what: str) -> int:
    return parse_size(text.removesuffix("/s"), what)


def _parse_seed(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > SEED_MAX:
        raise FarmemError(f"{what} {text!r} is not a seed", "write a whole number, as seed=1")
    return int(text)


# For each filter its keys, in the order of params, and what reads a value.
# "file" is apart: it goes to the path.
_Parser = Callable[[str, str], int]
_KEYS: dict[str, dict[str, _Parser]] = {
    "checksum": {},
    "stats": {},
    "delay": {"rtt": parse_duration, "bandwidth": _parse_bandwidth},
    "error": {
        "fetch": parse_chance_ppm,
        "store": parse_chance_ppm,
        "corrupt": parse_chance_ppm,
        "seed": _parse_seed,
    },
}
_WITH_FILE = {"error"}
_KNOWN = (
    "filters are: checksum; stats; delay:rtt=10us,bandwidth=1G; "
    "error:fetch=0.01,store=0.01,corrupt=0.01,seed=1,file=PATH"
)


def parameters() -> dict[str, list[str]]:
    """Every filter with the names of its parameters."""
    return {
        name: [*keys, "file"] if name in _WITH_FILE else list(keys) for name, keys in _KEYS.items()
    }


def _armed_by(path: str) -> str:
    absolute = os.path.abspath(path) if path else ""
    if not absolute or len(os.fsencode(absolute)) > PATH_BYTES_MAX:
        raise FarmemError(
            f"filter error: file {path!r} is empty or longer than {PATH_BYTES_MAX} bytes",
            "name a shorter path, as file=/tmp/armed",
        )
    return absolute


def parse_filter(text: str) -> Filter:
    """One --filter."""
    name, colon, rest = text.partition(":")
    keys = _KEYS.get(name)
    if keys is None:
        raise FarmemError(f"there is no filter {name!r}", _KNOWN)
    params = dict.fromkeys(keys, 0)
    path = ""
    given: set[str] = set()
    for pair in rest.split(",") if colon else ():
        key, equals, value = pair.partition("=")
        if key in given or not equals:
            wrong = "is given twice" if key in given else "is not key=value"
            raise FarmemError(f"filter {name}: {pair!r} {wrong}", _KNOWN)
        given.add(key)
        if key == "file" and name in _WITH_FILE:
            path = _armed_by(value)
        elif key in keys:
            params[key] = keys[key](value, f"filter {name}: {key}")
        else:
            raise FarmemError(f"filter {name} has no parameter {key!r}", _KNOWN)
    return Filter(name, tuple(params.values()), path, text)


def limited(filters: Sequence[Filter]) -> list[Filter]:
    """The filters, outermost first, if there are not too many."""
    if len(filters) > FILTERS_MAX:
        raise FarmemError(f"{len(filters)} filters are more than {FILTERS_MAX}", "leave some out")
    return list(filters)


def parse_filters(texts: tuple[str, ...]) -> list[Filter]:
    """Every --filter, outermost first."""
    return limited([parse_filter(text) for text in texts])


def write_filters(filters: list[Filter], control: Any, lib: Any) -> None:
    """Put the filters into a control segment."""
    control.filters = len(filters)
    for slot, item in zip(control.filter, filters, strict=False):
        slot.kind = getattr(lib, f"FM_FILTER_{item.name.upper()}")
        for index, value in enumerate(item.params):
            slot.params[index] = value
        slot.path = os.fsencode(item.path)
