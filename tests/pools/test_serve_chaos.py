"""Many clients, some of which vanish, on a data process that is killed: no wrong byte, no leak.

The server has just as many addresses as memory, so what one lease leaves is where the next
one lies.  A connection that breaks is made anew, as a client in earnest would; a write that
was not acknowledged may or may not have happened, everything else must be as it was written.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from typing import Any

import pytest

from farmem.pool.nbd import NbdError
from tests.pools.serving import MIB, TCP, UNIX, Data, Server, serving, until

pytestmark = pytest.mark.pools
BLOCK = 64 << 10
CLIENTS = 4
LEASES_EACH = 12
CALLS_EACH = 30
KILLS = 2


class Client:
    """One lease after the other; what it wrote is what it must read."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.wrong: list[Any] = []
        self.leases = 0
        self.broken = 0
        self.data: Data | None = None

    def run(self) -> None:
        try:
            while self.leases < LEASES_EACH:
                self.use_a_lease()
        except BaseException as error:
            self.wrong.append(error)
            raise

    def use_a_lease(self) -> None:
        size = self.random.randint(1, 4) * 2 * MIB
        way = self.random.choice((TCP, UNIX))
        status, lease = self.server.ask("POST", "/v1/leases", {"bytes": size}, way=way)
        if status == 507:
            return
        assert status == 201, lease
        self.leases += 1
        known: dict[int, bytes | None] = {}
        for _ in range(CALLS_EACH):
            self.call(lease, known)
        if self.random.random() < 0.7:
            self.server.release(lease)
            if self.data is not None:
                with contextlib.suppress(NbdError, OSError):
                    self.wrong.append(("read after the end", self.data.read(0, 10)))
        self.hang_up()

    def call(self, lease: dict[str, Any], known: dict[int, bytes | None]) -> None:
        at = self.random.randrange(lease["bytes"] // BLOCK) * BLOCK
        kind = self.random.random()
        try:
            self.data = self.data or Data(lease)
            if kind < 0.6:
                data = self.random.randbytes(BLOCK) if kind < 0.5 else bytes(BLOCK)
                known[at] = None  # whatever it is, until it is acknowledged
                self.data.write(at, data) if kind < 0.5 else self.data.trim(at, BLOCK)
                known[at] = data
                return
            found, wanted = self.data.read(at, BLOCK), known.get(at, bytes(BLOCK))
            if wanted is not None and found != wanted:
                self.wrong.append((lease["lease"], at, found[:16], wanted[:16]))
        except (NbdError, OSError):
            self.broken += 1
            self.hang_up()

    def hang_up(self) -> None:
        if self.data is not None:
            self.data.close()
            self.data = None


def test_no_wrong_byte_and_no_leak() -> None:
    with serving("--ttl", "1s", env={"FARMEM_TEST_POOL": "space=64M"}) as server:
        clients = [Client(server, seed) for seed in range(CLIENTS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        for number in range(KILLS):
            share = CLIENTS * LEASES_EACH * (number + 1) // (KILLS + 1)
            until(lambda share=share: sum(c.leases for c in clients) >= share, "the leases", 120)
            os.kill(server.nbdkit(), signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert [client.wrong for client in clients] == [[]] * CLIENTS
        until(lambda: server.about()["free_bytes"] == 64 * MIB, "the memory")
        metrics = server.metrics()
        assert metrics["used_bytes"] == 0 and metrics["leases"] == 0
        assert metrics["data_restarts_total"] == KILLS
        assert metrics["leases_granted_total"] == CLIENTS * LEASES_EACH
        assert metrics['leases_ended_total{how="expired"}'] > 0
