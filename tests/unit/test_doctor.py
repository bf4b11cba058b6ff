"""The doctor itself: the trial run's verdict, what goes wrong while looking, and the report.

What it concludes about a host is in test_doctor_userfaultfd.py and test_doctor_system.py;
the real host is looked at in test_doctor_runs.py.
"""

import errno
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from farmem.doctor import GROUPS
from farmem.doctor import trial as trial_of_doctor
from farmem.doctor.findings import (
    Answer,
    Check,
    Finding,
    Group,
    Mark,
    examine,
    look,
    missing,
    ok,
    stands_in_the_way,
    unknown,
    warning,
)
from farmem.doctor.host import Host, Ran
from farmem.doctor.report import as_json, as_lines
from farmem.errors import FarmemError
from tests.unit.played_host import CHECKS, FULL, SYSCTL, PlayedHost, answer, refused

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def host(tmp_path: Path) -> PlayedHost:
    return PlayedHost(tmp_path)


# ---- farmem itself -----------------------------------------------------------------------------


GOOD = {"pages_evicted": 5000, "pages_fetched": 5000}


@pytest.mark.parametrize(
    ("ran", "statistics", "named"),
    [
        (Ran(0, "wrong pages: 1\n", ""), GOOD, "wrong bytes"),
        (Ran(0, "", ""), GOOD, "wrong bytes"),
        (Ran(125, "", "farmem: the system refused: x\n"), {}, "failed: farmem: the system refused"),
        (Ran(-31, "", ""), {}, "exit status -31"),
        (Ran(-9, "", "", True), {}, "did not end"),
        (Ran(0, "wrong pages: 0\n", ""), {}, "not paged: no reason"),
        (Ran(0, "wrong pages: 0\n", "farmem: [1] no room\n"), {**GOOD, "pages_fetched": 9},
         "not paged: farmem: [1] no room"),
    ],
)  # fmt: skip
def test_a_trial_that_went_wrong(ran: Ran, statistics: dict[str, Any], named: str) -> None:
    found = trial_of_doctor.verdict(ran, statistics)
    assert found.mark == Mark.MISSING
    assert named in found.found
    assert found.mend


def test_a_trial_that_went_well() -> None:
    found = trial_of_doctor.verdict(Ran(0, "wrong pages: 0\n", ""), GOOD)
    assert (found.mark, found.values) == (Mark.OK, GOOD)


def test_a_trial_that_can_not_be(host: PlayedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_of_doctor, "_some_python", lambda: "")
    assert answer(host, "trial").mark == Mark.UNKNOWN
    host.userfaultfd = refused(1, 0)
    assert "userfaultfd" in answer(host, "trial").found


def test_the_trial_starts_afresh_and_vouches_only_where_it_must(host: PlayedHost) -> None:
    """A job around the doctor, a test's defects, the user's options: the trial sees none."""
    seen: list[tuple[tuple[str, ...], Mapping[str, str]]] = []

    def python(code: str, *words: str, environment: Mapping[str, str], **_: float) -> Ran:
        seen.append((words, environment))
        return Ran(0, "wrong pages: 0", "")

    host.python = python  # type: ignore[method-assign]
    host.environ = {"FARMEM_JOB": "a:b", "LD_PRELOAD": "x.so", "PATH": "/bin"}
    answer(host, "trial")
    host.userfaultfd = FULL._replace(features=0xFFFF)
    answer(host, "trial")
    assert [environment for _, environment in seen] == [{"PATH": "/bin"}] * 2
    assert ["--no-pinned-io" in words for words, _ in seen] == [False, True]


def test_a_library_that_does_not_load(host: PlayedHost) -> None:
    assert answer(host, "library").mark == Mark.OK
    host.ran = Ran(1, "", "ERROR: ld.so: object 'x' cannot be preloaded: ignored.\n")
    found = answer(host, "library")
    assert found.mark == Mark.MISSING
    assert "ld.so" in found.found
    host.ran = Ran(0, "", "ERROR: ld.so: object 'x' from LD_PRELOAD cannot be preloaded.\n")
    assert answer(host, "library").mark == Mark.MISSING


# ---- what goes wrong while looking -------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/proc/x"), "/proc/x: Permission"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (ValueError("no number"), "ValueError: no number"),
        (ZeroDivisionError("oops"), "ZeroDivisionError: oops"),
    ],
)
def test_what_can_not_be_looked_at_says_why(host: Host, error: Exception, said: str) -> None:
    def look_at(host: Host) -> Answer:
        raise error

    found = look(Check("x", "x", look_at), host)
    assert found.mark == Mark.UNKNOWN
    assert found.found.startswith(f"could not be looked at: {said}")


def test_an_error_of_farmems_own_is_something_missing(host: Host) -> None:
    def look_at(host: Host) -> Answer:
        raise FarmemError("a is not b", "type c")

    assert look(Check("x", "x", look_at), host) == missing("a is not b", "type c")


@pytest.mark.parametrize("path", ["/proc/self/status", SYSCTL, "/proc/self/cgroup"])
def test_no_unreadable_file_ends_the_doctor(host: PlayedHost, path: str) -> None:
    """Every file in turn is a folder: reading it fails, even for root."""
    (host.folder / path.lstrip("/")).unlink(missing_ok=True)
    (host.folder / path.lstrip("/")).mkdir(parents=True)
    host.userfaultfd = refused(errno.EPERM, errno.EPERM)
    findings = list(examine(GROUPS, host))
    assert len(findings) == len(CHECKS)
    assert any("Is a directory" in finding.answer.found for finding in findings)


# ---- the report --------------------------------------------------------------------------------


def report(*answers: tuple[str, Answer]) -> tuple[tuple[Group, ...], list[Finding]]:
    checks = {
        group: tuple(Check(f"{group}{n}", f"{group} {n}", lambda host: ok(""))
                     for n, (of, _) in enumerate(answers) if of == group)
        for group in ("required", "cases", "optional")
    }  # fmt: skip
    groups = tuple(Group(name, name.title(), checks[name]) for name in checks)
    left = {name: list(found) for name, found in checks.items()}
    return groups, [Finding(group, left[group].pop(0), found) for group, found in answers]


@pytest.mark.parametrize(
    ("group", "found", "can_run"),
    [
        ("required", ok("there"), True),
        ("required", warning("there", "mind"), True),
        ("required", missing("gone", "get it"), False),
        ("required", unknown("dark"), False),
        ("cases", missing("gone"), True),
        ("optional", unknown("dark"), True),
    ],
)
def test_only_what_is_required_stands_in_the_way(group: str, found: Answer, can_run: bool) -> None:
    groups, findings = report((group, found))
    assert stands_in_the_way(findings[0]) != can_run
    assert json.loads(as_json(findings))["can_run"] == can_run
    last = list(as_lines(groups, findings))[-1]
    assert last.startswith("farmem can run" if can_run else "farmem can't run")


def test_the_lines_are_aligned_and_say_what_to_type() -> None:
    groups, findings = report(
        ("required", ok("good")),
        ("required", missing("gone", "type this", "type that")),
        ("optional", warning("odd\nlines \udcff")),
    )
    assert [click.unstyle(line) for line in as_lines(groups, findings)] == [
        "Required",
        "  ok       required 0  good",
        "  missing  required 1  gone",
        "           -> type this",
        "           or type that",
        "",
        "Optional",
        "  warning  optional 2  odd lines \\udcff",
        "",
        "farmem can't run programs here: required 1.",
    ]


def test_the_json_has_the_documented_keys(host: PlayedHost) -> None:
    host.userfaultfd = refused(errno.EPERM, 0)
    told = json.loads(as_json(examine(GROUPS, host)))
    assert set(told) == {"schema", "version", "can_run", "checks"}
    assert told["schema"] == 1
    assert [check["name"] for check in told["checks"]] == list(CHECKS)
    keys = {"group", "name", "label", "mark", "found", "mend", "values"}
    assert all(set(check) == keys for check in told["checks"])
    page = (ROOT / "docs" / "doctor.md").read_text()
    assert [key for key in {*told, *keys} if f"`{key}`" not in page] == []


def test_every_line_is_explained_in_the_docs() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    named = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(name for name in named if name in CHECKS) == sorted(CHECKS)


def test_the_help_of_all_verbs_does_not_pull_the_doctor_in() -> None:
    """`farmem --help` imports every verb's module."""
    code = "import sys, farmem.cli.doctor; print(sorted(m for m in sys.modules if 'doctor' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['farmem.cli.doctor']"
