"""One plain run for each program, shared by all tests of the session that compare with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.survive.plain import Plain, run_plain_sampled
from tests.survive.programs import Call, Workload
from tests.survive.redis_server import RedisPlain, redis_plain

Prepared = tuple[Call, Plain]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Workload], Prepared]:
    """The workload's inputs, its command, and its plain run: made when first asked for."""
    made: dict[str, Prepared] = {}

    def prepare(workload: Workload) -> Prepared:
        if reason := workload.missing():
            pytest.skip(reason)
        if workload.name not in made:
            call = workload.prepare(tmp_path_factory.mktemp(workload.name))
            made[workload.name] = (call, run_plain_sampled(call))
        return made[workload.name]

    return prepare


@pytest.fixture(scope="session")
def plain_redis() -> RedisPlain:
    """Redis without farmem, put through the same: what it takes when nothing is short."""
    with tempfile.TemporaryDirectory(prefix="farmem-redis-") as name:
        return redis_plain(Path(name))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short path: the path of a Unix socket may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="farmem-redis-") as name:
        yield Path(name)
