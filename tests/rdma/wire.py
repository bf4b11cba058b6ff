"""Runs in two guests at once, which are joined by a wire: a server in one, its client in the other.

Which it is, FARMEM_GUEST_LINK says (tools/guest.sh --link).
"""

from __future__ import annotations

import http.client
import os
import random
import sys

from tests.pools.serving import LIMIT_S, MIB, Server, serving, until
from tests.rdma.batch import REQUIRED, counter, fails_with
from tests.rdma.client import Client

HOST, PORT = "10.99.0.1", 7717
SIZE = 4 * MIB
BLOCK = 64 << 10


class FarServer(Server):
    """The server, as it is seen from the other host: all that there is of it is its port."""

    def __init__(self) -> None:
        self.tokens = set()
        self.given = []

    def connection(self, way: str = "") -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, PORT, timeout=LIMIT_S)

    def is_there(self) -> bool:
        try:
            return self.ask("GET", "/healthz")[0] == 200
        except OSError:
            return False


def serve() -> None:
    """Until the client's lease has come and gone; what it did was not done by us."""
    listens = ("127.0.0.1:0", f"{HOST}:{PORT}")
    with serving(*REQUIRED, "--tls", "off", listens=listens) as server:
        until(lambda: server.metrics()["leases_granted_total"], "the client's lease")
        until(lambda: server.about()["leases"] == 0, "the client's end")
        until(lambda: server.metrics()["clearing_bytes"] == 0, "the memory")
        metrics = server.metrics()
        assert metrics['data_requests_total{kind="write"}'] == metrics["rdma_queue_pairs"] == 0
        until(lambda: "released" in server.log, "the lease's end")


def use() -> None:
    server = FarServer()
    until(server.is_there, "the server")
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
        assert fails_with(lambda: client.read(0, 1))


def main() -> None:
    if os.environ["FARMEM_GUEST_LINK"] == "0":
        serve()
    else:
        use()
    print("all is well", flush=True)
    sys.stdout.flush()


main()
