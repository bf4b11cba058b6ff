"""Runs in two guests at once, joined by a wire: a server in one, its clients in the other.

Which it is, FARMEM_GUEST_LINK says (tools/guest.sh --link).  The clients judge.  The server's guest
tells them what they ask for over a connection of the test's own, and stays until they have hung
up: its end is the end of the network, and an answer that is still under way would be lost with it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
from typing import Any

from tests.pools.serving import LIMIT_S, MIB, Server, serving, until
from tests.rdma import programs, run
from tests.rdma.cases import REQUIRED, counter, fails_with, work_of
from tests.rdma.client import Client

HOST, PORT, TALK_PORT = "10.99.0.1", 7717, 7718
SIZE = 4 * MIB
BLOCK = 64 << 10
CONNECT_S = 5  # then it is tried again
GOODBYE_S = 20


# ---- the server's guest


def figures(server: Server) -> dict[str, Any]:
    work, metrics = work_of(server), server.metrics()
    return {
        **work,
        "leases": server.about()["leases"],
        "clearing_bytes": metrics["clearing_bytes"],
        "queue_pairs": metrics["rdma_queue_pairs"],
        "nbd_writes": metrics['data_requests_total{kind="write"}'],
        "released": server.log.count(": released"),
    }


def serve() -> None:
    """Until the clients hang up."""
    listens = ("127.0.0.1:0", f"{HOST}:{PORT}")
    with (
        socket.create_server((HOST, TALK_PORT)) as door,
        serving(*REQUIRED, "--tls", "off", listens=listens, capacity=run.CAPACITY) as server,
    ):
        door.settimeout(LIMIT_S)
        talk = door.accept()[0]
        talk.settimeout(2 * run.LIMIT_S)
        with talk, talk.makefile("rw") as lines:
            for _ in lines:
                print(json.dumps(figures(server)), file=lines, flush=True)


# ---- its clients'


class FarServer(Server):
    """The server, as it is seen from the other host: its port, and what its guest tells."""

    def __init__(self) -> None:
        self.tokens = set()
        self.given = []
        self._talk: socket.socket = until(self._reach, "the server's guest")
        self._lines = self._talk.makefile("rw")

    def _reach(self) -> socket.socket | None:
        with contextlib.suppress(OSError):
            talk = socket.create_connection((HOST, TALK_PORT), CONNECT_S)
            talk.settimeout(LIMIT_S)
            return talk
        return None

    def connection(self, way: str = "") -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, PORT, timeout=LIMIT_S)

    def figures(self) -> dict[str, Any]:
        """Once it serves."""
        print("figures", file=self._lines, flush=True)
        found = json.loads(self._lines.readline())
        assert isinstance(found, dict)
        return found

    def __enter__(self) -> FarServer:
        return self

    def __exit__(self, *_: object) -> None:
        """Until the other guest has seen it, or has gone: nothing of it is needed any more."""
        with contextlib.suppress(OSError):
            self._talk.shutdown(socket.SHUT_WR)
            self._talk.settimeout(GOODBYE_S)
            while self._talk.recv(4096):
                pass
        self._lines.close()
        self._talk.close()


def nothing_is_left(server: FarServer) -> dict[str, Any]:
    until(lambda: server.figures()["clearing_bytes"] == 0, "the memory")
    found = server.figures()
    assert found["leases"] == found["queue_pairs"] == found["nbd_writes"] == 0, found
    return found


def verbs(server: FarServer) -> None:
    """With pyverbs alone: what is written is read."""
    assert server.figures()["leases"] == 0
    lease = server.lease(SIZE)
    source = random.Random(5)
    blocks = {at: source.randbytes(BLOCK) for at in range(0, SIZE, BLOCK)}
    with Client() as client:
        before = counter("sent_pkts")
        client.connect(server, lease)
        assert client.theirs["gid"] == f"::ffff:{HOST}"
        for at, block in blocks.items():
            client.write(at, block)
        for at, block in blocks.items():
            assert client.read(at, BLOCK) == block
        assert counter("sent_pkts") - before >= SIZE // client.theirs["mtu"]
        server.release(lease)
        # The answer comes first; then the queue pairs go, and then the memory is cleared.
        assert nothing_is_left(server)["released"] == 1
        assert fails_with(lambda: client.read(0, 1))


def farmem_run(server: FarServer) -> None:
    """A program whose memory is there, moved by the devices alone."""
    before, received = server.figures(), counter("rcvd_pkts")
    stats = run.run(programs.VERIFY, HOST, PORT)
    # Each page is a packet of its own: what is read comes to us, what is written to the server.
    assert counter("rcvd_pkts") - received >= stats["pages_fetched"], stats
    after = nothing_is_left(server)
    run.assert_one_sided({key: after[key] - before[key] for key in before}, stats)


def main() -> None:
    if os.environ["FARMEM_GUEST_LINK"] == "0":
        serve()
    else:
        with FarServer() as server:
            verbs(server)
            farmem_run(server)
    print("all is well", flush=True)


main()
