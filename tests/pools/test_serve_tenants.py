"""Nobody reads another tenant's bytes, nor a former tenant's, nor writes where its lease is over.

Addresses are practically never lent twice, so here the server is told to have few of them
(FARMEM_TEST_POOL=space=...): then what one lease leaves is where the next one lies.  Each
test has a twin with the fix taken out, which must be noticed.
"""

from __future__ import annotations

import os
import time

import pytest

from farmem.pool.nbd import NbdError
from tests.pools.serving import MIB, TCP, UNIX, Data, Server, serving, until

pytestmark = [pytest.mark.pools, pytest.mark.safety]
SIZE = 8 * MIB


def server_with(defect: str = "") -> object:
    words = f"{defect},space=8M" if defect else "space=8M"
    return serving(capacity="8M", env={"FARMEM_TEST_POOL": words})


def bytes_left_behind(server: Server) -> int:
    """How many bytes of a former tenant's a new one finds."""
    first = server.lease(SIZE)
    with Data(first) as data:
        for at in range(0, SIZE, MIB):
            data.write(at, b"s" * MIB)
    server.release(first)
    until(lambda: server.metrics()["clearing_bytes"] == 0, "the memory")
    second = server.lease(SIZE, UNIX)
    with Data(second) as data:
        found = sum(MIB - data.read(at, MIB).count(0) for at in range(0, SIZE, MIB))
    server.release(second)
    return found


def test_a_former_tenants_bytes_are_gone() -> None:
    with server_with() as server:
        assert bytes_left_behind(server) == 0
        until(lambda: server.metrics()["used_bytes"] == 0, "the memory")


def test_bytes_that_are_left_would_be_found() -> None:
    with server_with("keep_bytes") as server:
        assert bytes_left_behind(server) == SIZE


def an_old_connection_gets_in(server: Server, way: str) -> bool:
    """Whether a connection of an ended lease can read or change the next lease's bytes."""
    first = server.lease(SIZE, way)
    with Data(first) as old:
        old.write(0, b"first")
        server.release(first)
        until(lambda: server.metrics()["clearing_bytes"] == 0, "the memory")
        second = server.lease(SIZE, way)
        with Data(second) as new:
            new.write(0, b"secret")
            seen = b""
            try:
                seen = old.read(0, 6)
                old.write(0, b"broken")
            except NbdError:
                pass
            got_in = seen == b"secret" or new.read(0, 6) != b"secret"
        server.release(second)
    return got_in


@pytest.mark.parametrize("way", [TCP, UNIX])
def test_a_connection_ends_with_its_lease(way: str) -> None:
    with server_with() as server:
        assert not an_old_connection_gets_in(server, way)


def test_a_connection_that_goes_on_would_be_found() -> None:
    with server_with("no_generation") as server:
        assert an_old_connection_gets_in(server, TCP)


def test_every_call_of_an_ended_lease_is_refused() -> None:
    with serving() as server:
        lease = server.lease(SIZE)
        with Data(lease) as data:
            data.write(0, b"x")
            server.release(lease)
            calls = (
                lambda: data.read(0, 1),
                lambda: data.write(0, b"y"),
                lambda: data.trim(0, 4096),
                lambda: data._runner.run(data._nbd.flush()),
            )
            for call in calls:
                with pytest.raises(NbdError, match="error 108"):  # NBD_ESHUTDOWN
                    call()
        with pytest.raises(NbdError):
            Data(lease)
        assert server.metrics()["used_bytes"] == 0


def test_neighbours_see_only_their_own() -> None:
    """All leases of a full server, written and read at the same time."""
    with serving(env={"FARMEM_TEST_POOL": "space=64M"}) as server:
        leases = [server.lease(4 * MIB, (TCP, UNIX)[i % 2]) for i in range(16)]
        marks = [os.urandom(4096) for _ in leases]
        connections = [Data(lease) for lease in leases]
        try:
            for data, mark in zip(connections, marks, strict=True):
                for at in range(0, 4 * MIB, 64 << 10):
                    data.write(at, mark)
            for data, mark in zip(connections, marks, strict=True):
                for at in range(0, 4 * MIB, 64 << 10):
                    assert data.read(at, 4096) == mark
        finally:
            for data in connections:
                data.close()


def test_tokens_are_told_once() -> None:
    """Not in a list of processes, an environment, a metric, an answer or a log."""
    with serving() as server:
        lease = server.lease(SIZE, job="a job")
        with Data(lease):
            pids = (server.process.pid, server.nbdkit())
            seen = server.log
            for pid in pids:
                for name in ("cmdline", "environ", "maps", "comm"):
                    with open(f"/proc/{pid}/{name}", "rb") as file:
                        seen += file.read().decode(errors="replace")
                for entry in os.scandir(f"/proc/{pid}/fd"):
                    seen += os.readlink(entry.path)
            for path in ("/metrics", "/v1/server", "/healthz", f"/v1/leases/{lease['lease']}"):
                seen += str(server.ask("GET", path))
            time.sleep(0.1)
        assert lease["lease"] in server.log and "a job" in server.log
        assert lease["token"] not in seen + server.log
