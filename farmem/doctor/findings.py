"""What a check is, what it answers, and how all of them are gone through.

A check looks at one thing through a Host and answers; it knows neither the terminal nor
JSON.  Whatever goes wrong while it looks is an answer as well: could not be looked at.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

from farmem.doctor.host import Host
from farmem.errors import FarmemError


class Mark(StrEnum):
    """How a thing was found."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"
    UNKNOWN = "unknown"  # it could not be looked at


class Answer(NamedTuple):
    """What a check found, what to type to mend it (any one of them), and the figures."""

    mark: Mark
    found: str
    mend: tuple[str, ...] = ()
    values: Mapping[str, Any] = MappingProxyType({})


class Check(NamedTuple):
    """One line: a name that stays, a label for people, and who looks."""

    name: str
    label: str
    look: Callable[[Host], Answer]


class Group(NamedTuple):
    """Checks of the same weight."""

    name: str
    title: str
    checks: tuple[Check, ...]


class Finding(NamedTuple):
    """A check and its answer."""

    group: str
    check: Check
    answer: Answer


def ok(found: str, **values: Any) -> Answer:
    """It is there."""
    return Answer(Mark.OK, found, (), values)


def warning(found: str, *mend: str, **values: Any) -> Answer:
    """It is there, but mind this."""
    return Answer(Mark.WARNING, found, mend, values)


def missing(found: str, *mend: str, **values: Any) -> Answer:
    """It is not there."""
    return Answer(Mark.MISSING, found, mend, values)


def unknown(why: str, *mend: str) -> Answer:
    """It could not be looked at."""
    return Answer(Mark.UNKNOWN, f"could not be looked at: {why}", mend)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def look(check: Check, host: Host) -> Answer:
    """The check's answer.  Nothing that it meets may end the doctor: not even a bug of ours."""
    try:
        return check.look(host)
    except FarmemError as error:
        return missing(error.what, *filter(None, [error.hint]))
    except Exception as error:
        return unknown(_reason(error))


def examine(groups: tuple[Group, ...], host: Host) -> Iterator[Finding]:
    """Every check of every group, in their order."""
    for group in groups:
        for check in group.checks:
            yield Finding(group.name, check, look(check, host))


def stands_in_the_way(finding: Finding) -> bool:
    """Something required that is not known to be there."""
    return finding.group == "required" and finding.answer.mark in (Mark.MISSING, Mark.UNKNOWN)
