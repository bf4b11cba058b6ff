"""Fixtures that several unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.started import LIMIT_SECONDS, Start, Started


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Started] = []

    def begin(script: str, *arguments: str) -> Started:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Started(folder, script, arguments))
        return started[-1]

    yield begin
    for job in started:
        if job.process.returncode is None:
            job.process.kill()
            job.process.communicate(timeout=LIMIT_SECONDS)
