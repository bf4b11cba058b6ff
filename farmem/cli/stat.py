"""farmem stat: what running jobs do now.

Looks twice, a moment apart, because a rate needs two looks; with --watch again and again.
Nothing here touches a job: its supervisor is asked for figures.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from farmem import __version__
from farmem.cli.options import Parsed
from farmem.errors import FarmemError
from farmem.rates import rates_between
from farmem.running import Round, Silent, parse_pid, printable, status_of, statuses
from farmem.sizes import format_bytes

FIRST_SECONDS = 0.5
WATCH_SECONDS = "1"
_WATCH_SECONDS_LEAST = 0.05
_WATCH_SECONDS_MOST = 60.0
_COMMAND_CHARACTERS = 60
_CLEAR = "\x1b[H\x1b[2J"
_MEMBERS = f"  {'PID':>8} {'STATE':7} {'LOCAL':>10} {'REMOTE':>10} {'MANAGED':>10} {'ENGINE':>10}"
_MEMBERS += f" {'FAULTS':>12} COMMAND"
_LINES = f"{'SECONDS':>8} {'LOCAL':>10} {'BUDGET':>10} {'REMOTE':>10} {'FAULTS/s':>10}"
_LINES += f" {'FETCHED/s':>10} {'EVICTED/s':>10} {'STALLED':>8} JOB"

Jobs = list[dict[str, Any]]


def _samples(pid: int | None, seconds: float) -> Iterator[Round]:
    """How the jobs stand, with rates; ends when there is none (any more)."""
    jobs = [status_of(pid)["job"]] if pid is not None else None
    before = statuses(jobs)
    wait = min(FIRST_SECONDS, seconds)
    while before.answers or before.silent:
        time.sleep(wait)
        wait = seconds
        now = statuses(jobs)
        _add_rates(before, now)
        if now.answers or now.silent:
            yield now
        before = now


def _two_samples(pid: int | None) -> Round:
    """How the jobs stand, with rates.  Who does not answer is asked once only."""
    before = Round([status_of(pid)], []) if pid is not None else statuses()
    time.sleep(FIRST_SECONDS if before.answers else 0)
    now = statuses([status["job"] for status in before.answers])
    _add_rates(before, now)
    return Round(now.answers, before.silent + now.silent)


def _add_rates(before: Round, now: Round) -> None:
    earlier = {status["job"]: status for status in before.answers}
    for status in now.answers:
        known = earlier.get(status["job"])
        status["rates"] = rates_between(known, status) if known else None


def _silent_entry(silent: Silent) -> dict[str, Any]:
    return silent._asdict()


def _as_json(found: Round, indent: int | None) -> str:
    unanswered = [_silent_entry(silent) for silent in found.silent]
    document = {"version": __version__, "jobs": found.answers, "unanswered": unanswered}
    return json.dumps(document, indent=indent)


def _command(words: list[str]) -> str:
    text = printable(" ".join(words))
    return text if len(text) <= _COMMAND_CHARACTERS else f"{text[: _COMMAND_CHARACTERS - 3]}..."


def _rate(status: dict[str, Any], name: str) -> str:
    rates = status["rates"]
    return f"{rates[f'{name}_per_second']:,.0f}" if rates else "-"


def _stalled(status: dict[str, Any]) -> str:
    return f"{status['rates']['stalled_share']:.0%}" if status["rates"] else "-"


def _member_line(member: dict[str, Any]) -> str:
    sizes = [
        format_bytes(member[f"{name}_bytes"]) for name in ("local", "remote", "managed", "engine")
    ]
    columns = " ".join(f"{size:>10}" for size in sizes)
    name, state = printable(member["command"]), printable(member["state"])
    return f"  {member['pid']:>8} {state:7} {columns} {member['faults']:>12,} {name}"


def _job_lines(status: dict[str, Any]) -> list[str]:
    """A job for a person to read."""
    changed = status.get("budget_changes", 0)
    return [
        f"{status['job']}: {_command(status['command'])}",
        f"  user {status['uid']}, supervisor {status['supervisor_pid']}, "
        f"runs for {status['wall_ns'] / 1e9:.1f} s",
        f"  local    {format_bytes(status['local_bytes'])} of a budget of "
        f"{format_bytes(status['budget_bytes'])}" + (f" (changed {changed} x)" if changed else ""),
        f"  remote   {format_bytes(status['remote_bytes'])}; in pool {printable(status['pool'])} "
        f"{format_bytes(status['pool_stored_bytes'])}",
        f"  now      {_rate(status, 'faults')} faults/s, {_rate(status, 'pages_fetched')} pages "
        f"fetched/s, {_rate(status, 'pages_evicted')} evicted/s, {_stalled(status)} stalled",
        f"  in all   {status['faults']:,} faults, {status['pages_fetched']:,} pages fetched, "
        f"{status['pages_evicted']:,} evicted, {status['stall_ns'] / 1e9:.1f} s stalled",
        _MEMBERS,
        *(_member_line(member) for member in status["members"]),
    ]


def _as_text(found: Round) -> list[str]:
    lines: list[str] = []
    for status in found.answers:
        lines += [*_job_lines(status), ""]
    return lines[:-1]


def _as_lines(found: Round) -> list[str]:
    """A line for each job, to be appended: for a file or a pipe."""
    lines = []
    for status in found.answers:
        sizes = [format_bytes(status[f"{name}_bytes"]) for name in ("local", "budget", "remote")]
        rates = [_rate(status, name) for name in ("faults", "pages_fetched", "pages_evicted")]
        columns = " ".join(f"{text:>10}" for text in (*sizes, *rates))
        seconds = status["wall_ns"] / 1e9
        lines.append(f"{seconds:>8.1f} {columns} {_stalled(status):>8} {status['job']}")
    return lines


def _complaints(found: Round) -> list[str]:
    return [str(silent.error()) for silent in found.silent]


def _show_screen(found: Round) -> None:
    """On a terminal, over what was there before; what does not fit is left out."""
    lines = [*_as_text(found), *(f"farmem: {text}" for text in _complaints(found))]
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    room = max(rows - 1, 1) if rows else len(lines)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} lines more"]
    print(_CLEAR + "\n".join(line[: columns or None] for line in lines), flush=True)


def _watch(pid: int | None, seconds: float, wants_json: bool) -> bool:
    """Show until there is no job any more; whether there was one."""
    shown = False
    for found in _samples(pid, seconds):
        if wants_json:
            print(_as_json(found, None), flush=True)
        elif sys.stdout.isatty():
            _show_screen(found)
        else:
            lines = _as_lines(found) if shown else [_LINES, *_as_lines(found)]
            print("\n".join(lines), flush=True)
            for text in _complaints(found):
                print(f"farmem: {text}", file=sys.stderr, flush=True)
        shown = True
    return shown


def _show_once(pid: int | None, wants_json: bool) -> None:
    found = _two_samples(pid)
    if pid is not None and not found.answers:
        if found.silent:
            raise found.silent[0].error()
        raise FarmemError(f"the job of process {pid} has just ended", "type: farmem stat")
    if wants_json:
        print(_as_json(found, 2), flush=True)
    elif found.answers:
        print("\n".join(_as_text(found)), flush=True)
    elif not found.silent:
        _say_none()
    if found.silent:
        raise found.silent[0].error()


def _say_none() -> None:
    print("no farmem job of yours is running", file=sys.stderr)


def _parse_watch(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not _WATCH_SECONDS_LEAST <= seconds <= _WATCH_SECONDS_MOST:
        raise FarmemError(
            f"--watch {text!r} is not a number of seconds from 0.05 to 60",
            "type: farmem stat PID --watch, or farmem stat --watch 2",
        )
    return seconds


def _stop_writing() -> None:
    """The reader has gone: what is still in Python's buffer must not be complained about."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@click.command(
    "stat",
    help="Show what running jobs do now: the job that process PID belongs to, or all jobs of "
    "this user (of every user, when root asks).",
    epilog="Rates are over half a second, or between two refreshes. With --watch it ends when "
    "the job does, or with Ctrl-C; where the output is not a terminal it appends lines.",
)
@click.option("--json", "wants_json", is_flag=True, help="JSON; with --watch an object a line.")
@click.option(
    "--watch",
    "seconds",
    metavar="[SECONDS]",
    type=Parsed("seconds", _parse_watch),
    is_flag=False,
    flag_value=WATCH_SECONDS,
    default=None,
    help=f"Refresh every SECONDS ({WATCH_SECONDS} if not given) until the job ends.",
)
@click.argument("pid", metavar="[PID]", required=False)
def command(wants_json: bool, seconds: float | None, pid: str | None) -> None:
    """See the help above."""
    number = parse_pid(pid, "farmem stat 1234") if pid is not None else None
    try:
        if seconds is None:
            _show_once(number, wants_json)
        elif not _watch(number, seconds, wants_json):
            _say_none()
    except BrokenPipeError:
        _stop_writing()
    except KeyboardInterrupt:
        if seconds is None:
            raise
