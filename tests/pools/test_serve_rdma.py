"""`farmem serve` with RDMA, as a process of its own, on a pyverbs that is played (tests/rdma/fake).

What is asked over HTTP, what is told and what is kept to itself.  Real verbs, and bytes that
really go another way than through the server, are in tests/rdma/test_soft_roce.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from tests.harness import FARMEM, ROOT
from tests.pools.serving import LIMIT_S, MIB, Data, Server, can_serve, refuses, serving, until

pytestmark = pytest.mark.pools
FAKE = str(ROOT / "tests" / "rdma" / "fake")
SIZE = 4 * MIB
THEIRS = {
    "qpn": 17, "psn": 4711, "gid": "::ffff:10.0.0.7", "lid": 0, "mtu": 1024, "link": "ethernet",
}  # fmt: skip


def env(verbs: str = "", test: str = "") -> dict[str, str]:
    return {"PYTHONPATH": FAKE, "FAKE_VERBS": verbs, "FARMEM_TEST_POOL": test}


def with_rdma(test: str = "") -> AbstractContextManager[Server]:
    return serving("--rdma", "require", env=env(test=test))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with with_rdma() as found:
        yield found


def pairs_path(lease: dict[str, Any]) -> str:
    return f"/v1/leases/{lease['lease']}/queue-pairs"


def connected(server: Server, lease: dict[str, Any]) -> dict[str, Any]:
    status, found = server.ask("POST", pairs_path(lease), THEIRS, token=lease["token"])
    assert status == 201, found
    assert isinstance(found, dict)
    return found


def test_a_queue_pair_from_beginning_to_end(server: Server) -> None:
    about = server.about()
    mine = {"link": "ethernet", "gid": "::ffff:127.0.0.1", "mtu": 4096}
    assert about["data"] == ["nbd", "rdma"] and about["rdma"] == mine
    lease = server.lease(SIZE)
    assert lease["rdma"] == mine
    found = connected(server, lease)
    assert found["bytes"] == SIZE and found["mtu"] == 1024
    assert server.metrics()["rdma_queue_pairs"] == 1
    assert server.metrics()["rdma_registered_bytes"] == SIZE
    path, token = f"{pairs_path(lease)}/{found['queue_pair']}", lease["token"]
    assert server.ask("DELETE", path, token="0" * 64)[0] == 401
    assert server.ask("DELETE", path, token=token)[0] == 204
    assert server.ask("DELETE", path, token=token)[0] == 404
    assert server.metrics()["rdma_queue_pairs"] == 0
    connected(server, lease)
    server.release(lease)
    until(lambda: server.metrics()["clearing_bytes"] == 0, "the memory")
    metrics = server.metrics()
    assert metrics["rdma_queue_pairs"] == metrics["rdma_registered_bytes"] == 0
    assert metrics["used_bytes"] == 0


def test_what_is_refused(server: Server) -> None:
    lease, other = server.lease(SIZE), server.lease(SIZE)
    path = pairs_path(lease)
    assert server.ask("POST", path, THEIRS)[0] == 401
    assert server.ask("POST", path, THEIRS, token=other["token"])[0] == 401
    assert server.ask("GET", path)[0] == 405
    for body in (b"", b"{", {}, {**THEIRS, "mtu": 1500}, {**THEIRS, "gid": "here"}):
        status, found = server.ask("POST", path, body, token=lease["token"])
        assert status == 400 and found["error"] and found["hint"]
    assert server.metrics()["rdma_registered_bytes"] == 0
    server.release(lease)
    server.release(other)
    assert server.ask("POST", path, THEIRS, token=lease["token"])[0] == 404


def test_secrets_are_told_once() -> None:
    with with_rdma() as server:
        lease = server.lease(SIZE)
        found = connected(server, lease)
        seen = "".join(str(server.ask("GET", path)) for path in ("/metrics", "/v1/server"))
        server.release(lease)
        server.end()
        for secret in (found["queue_pair"], found["rkey"], found["address"]):
            assert str(secret) not in server.log + seen
        assert "RDMA through fake0, port 1, GID 2 (::ffff:127.0.0.1, RoCE v2)" in server.log


def used_after_a_trim(test: str) -> float:
    """How much of a registered lease is there when all of it was trimmed over NBD."""
    with with_rdma(test) as server:
        lease = server.lease(SIZE)
        connected(server, lease)
        assert server.metrics()["used_bytes"] == SIZE
        with Data(lease) as data:
            data.write(0, b"x" * MIB)
            data.trim(0, SIZE)
            assert data.read(0, MIB) == bytes(MIB)
        return server.metrics()["used_bytes"]


@pytest.mark.safety
def test_pages_that_a_device_has_stay_where_they_are() -> None:
    """Behind a hole the device would go on with pages that are nobody's."""
    assert used_after_a_trim("") == SIZE


@pytest.mark.safety
def test_pages_that_go_would_be_found() -> None:
    assert used_after_a_trim("punch_pinned") == 0


def test_a_server_without_rdma() -> None:
    with serving("--rdma", "off", env=env()) as server:
        lease = server.lease(SIZE)
        assert server.about()["data"] == ["nbd"] and "rdma" not in lease
        status, found = server.ask("POST", pairs_path(lease), THEIRS, token=lease["token"])
        assert status == 409 and "no RDMA" in found["error"] and "tcp://" in found["hint"]
        assert server.metrics()["rdma_queue_pairs"] == 0


def test_rdma_is_offered_where_it_can_be_had() -> None:
    with serving(env=env()) as server:
        assert server.about()["data"] == ["nbd", "rdma"]
    with serving(env=env("none")) as server:
        assert server.about()["data"] == ["nbd"] and "RDMA" not in server.log
    with serving(env=env("open:13")) as server:
        assert server.about()["data"] == ["nbd"]
        assert "warning: no RDMA: RDMA device fake0 can't be opened" in server.log


def test_rdma_that_is_required() -> None:
    start = ("--capacity", "64M", "--listen", "127.0.0.1:0")
    said = refuses(*start, "--rdma=require", env=env("none"))
    assert "this host has no RDMA device" in said and "farmem doctor" in said
    said = refuses(*start, "--rdma-device", "mlx5_0", env=env())
    assert "there is no such device" in said and "fake0" in said
    said = refuses(*start, "--rdma-gid-index", "9", env=env())
    assert "no such GID" in said and "2 (::ffff:127.0.0.1, RoCE v2)" in said
    assert "is no index" in refuses(*start, "--rdma-gid-index", "first", env=env())
    assert "--rdma=off" in refuses(*start, "--rdma=off", "--rdma-device", "fake0", env=env())


def self_test(verbs: str, test: str = "") -> subprocess.CompletedProcess[str]:
    can_serve()
    return subprocess.run(
        [FARMEM, "serve", "--self-test", "--rdma", "require"],
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
        check=False,
        env={**os.environ, **env(verbs, test)},
    )


def test_the_self_test_goes_this_way_too() -> None:
    done = self_test("")
    assert done.returncode == 0, done.stderr
    assert "RDMA through fake0" in done.stdout and "all is well" in done.stdout


@pytest.mark.parametrize(
    ("verbs", "test", "said"),
    [
        ("to_rts:110", "", "no queue pair was made"),
        ("", "keep_registration", "a lease that has ended can still be read"),
    ],
)
def test_the_self_test_finds_what_is_wrong(verbs: str, test: str, said: str) -> None:
    done = self_test(verbs, test)
    assert done.returncode == 125 and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr
