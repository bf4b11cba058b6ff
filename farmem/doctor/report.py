"""The findings for people (aligned lines) and for programs (JSON, docs/doctor.md).

Plain ASCII goes out, whatever a path or an error may hold: a terminal that can't show a
character must not be what ends the doctor.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import click

from farmem import __version__
from farmem.doctor.findings import Finding, Group, Mark, stands_in_the_way

SCHEMA = 1  # raised when a key changes its meaning or goes; new keys and checks don't raise it
_COLOURS = {Mark.OK: "green", Mark.WARNING: "yellow", Mark.MISSING: "red", Mark.UNKNOWN: "magenta"}
_MARK_WIDTH = max(len(mark) for mark in Mark)


def _plain(text: str) -> str:
    """ASCII, on one line."""
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())


def as_json(findings: Iterable[Finding]) -> str:
    """The report for programs."""
    findings = list(findings)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "can_run": not any(map(stands_in_the_way, findings)),
        "checks": [
            {
                "group": finding.group,
                "name": finding.check.name,
                "label": finding.check.label,
                "mark": finding.answer.mark.value,
                "found": _plain(finding.answer.found),
                "mend": [_plain(text) for text in finding.answer.mend],
                "values": dict(finding.answer.values),
            }
            for finding in findings
        ],
    }
    return json.dumps(report, indent=2)


def as_lines(groups: tuple[Group, ...], findings: Iterable[Finding]) -> Iterator[str]:
    """The report for people, a line at a time: the checks take their time."""
    titles = {group.name: group.title for group in groups}
    width = max(len(check.label) for group in groups for check in group.checks)
    indent = " " * (4 + _MARK_WIDTH)
    last = ""
    in_the_way: dict[Mark, list[str]] = {mark: [] for mark in Mark}
    for finding in findings:
        label, mark = finding.check.label, finding.answer.mark
        if finding.group != last:
            yield from ([""] if last else [])
            yield click.style(titles[finding.group], bold=True)
            last = finding.group
        shown = click.style(mark.value.ljust(_MARK_WIDTH), fg=_COLOURS[mark])
        yield f"  {shown}  {label.ljust(width)}  {_plain(finding.answer.found)}"
        for number, text in enumerate(finding.answer.mend):
            yield f"{indent}{'or' if number else '->'} {_plain(text)}"
        if stands_in_the_way(finding):
            in_the_way[mark].append(label)
    yield ""
    missing = in_the_way[Mark.MISSING] or in_the_way[Mark.UNKNOWN]
    if missing:
        yield f"farmem can't run programs here: {', '.join(missing)}."
    else:
        yield "farmem can run programs here."
