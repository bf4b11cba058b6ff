"""What `farmem stat` prints, on a terminal, into a pipe and as JSON; and how it ends.

The job is one of a fake engine's (test_running.py), whose figures are known.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.started import FARMEM, LIMIT_SECONDS, TWO_PROCESSES, Start, farmem


def test_a_job_is_shown_with_its_processes(start: Start) -> None:
    job = start(TWO_PROCESSES).wait_ready()
    done = farmem("stat", str(job.pid))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{job.name}: ")
    assert any("57.0 MiB of a budget of 64.0 MiB" in line for line in lines)
    assert any("37 faults, 300 pages fetched, 50 evicted" in line for line in lines)
    [member] = [line for line in lines if line.split()[0] == str(job.pid)]
    assert member.split()[1:6] == ["adopted", "50.0", "MiB", "9.0", "MiB"]


def test_without_a_pid_all_jobs_are_shown(start: Start) -> None:
    jobs = [start(TWO_PROCESSES).wait_ready() for _ in range(2)]
    text = farmem("stat").stdout
    document = json.loads(farmem("stat", "--json").stdout)
    for job in jobs:
        assert f"{job.name}: " in text
        [shown] = [each for each in document["jobs"] if each["job"] == job.name]
        assert shown["rates"]["faults_per_second"] == 0
        assert shown["rates"]["interval_ns"] > 0


def test_watching_appends_lines_and_ends_well_with_the_job(start: Start) -> None:
    job = start(TWO_PROCESSES).wait_ready()
    command = [str(FARMEM), "stat", str(job.pid), "--watch", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        lines = [watch.stdout.readline().decode() for _ in range(4)]
        job.finish()
        out, err = watch.communicate(timeout=LIMIT_SECONDS)
    lines += out.decode().splitlines()
    assert (watch.returncode, err) == (0, b"")
    assert "BUDGET" in lines[0]
    assert all(line.strip().endswith(job.name) for line in lines[1:])
    assert all("64.0 MiB" in line for line in lines[1:])


def test_watching_as_json_gives_an_object_a_line(start: Start) -> None:
    job = start(TWO_PROCESSES).wait_ready()
    command = [str(FARMEM), "stat", str(job.pid), "--watch=0.05", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        documents = [json.loads(watch.stdout.readline()) for _ in range(3)]
        job.finish()
        watch.communicate(timeout=LIMIT_SECONDS)
    assert watch.returncode == 0
    walls = [document["jobs"][0]["wall_ns"] for document in documents]
    assert walls == sorted(set(walls))


@pytest.mark.parametrize("words", [["--watch", "0.05"], ["--watch"]])
def test_watching_ends_well_with_an_interrupt(start: Start, words: list[str]) -> None:
    job = start(TWO_PROCESSES).wait_ready()
    command = [str(FARMEM), "stat", str(job.pid), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate(timeout=LIMIT_SECONDS)
    assert (watch.returncode, err) == (0, b"")


def test_a_reader_that_goes_is_no_error(start: Start) -> None:
    job = start(TWO_PROCESSES).wait_ready()
    command = [str(FARMEM), "stat", str(job.pid), "--watch", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        assert watch.stdout is not None and watch.stderr is not None
        watch.stdout.readline()
        watch.stdout.close()
        assert watch.stderr.read() == b""
        assert watch.wait(LIMIT_SECONDS) == 0


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_on_a_terminal_it_refreshes_the_screen(
    start: Start,
    terminal: tuple[int, int],
) -> None:
    ours, theirs = terminal
    job = start(TWO_PROCESSES).wait_ready()
    command = [str(FARMEM), "stat", str(job.pid), "--watch", "0.05"]
    text = b""
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE) as watch:
        os.close(theirs)
        deadline = time.monotonic() + LIMIT_SECONDS
        while text.count(b"\x1b[2J") < 3 and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                text += os.read(ours, 65536)
        assert text.count(b"\x1b[2J") >= 3
        job.finish()
        while watch.poll() is None and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # nobody has the other end any more
                    os.read(ours, 65536)
        assert watch.stderr is not None
        assert (watch.wait(LIMIT_SECONDS), watch.stderr.read()) == (0, b"")
    assert job.name.encode() in text


def test_help_names_both_verbs() -> None:
    text = farmem("--help").stdout
    assert "stat" in text and "set" in text
    assert "--watch" in farmem("stat", "--help").stdout
    assert "local=SIZE" in farmem("set", "--help").stdout
    assert Path(FARMEM).exists()
