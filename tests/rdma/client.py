"""A client of a lease over RDMA, written with pyverbs and nothing of farmem's.

One queue pair, one buffer, one request at a time.
"""

from __future__ import annotations

import time
from typing import Any

from pyverbs import enums
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

from tests.pools.serving import Server

DEVICE, PORT, GID_INDEX = "rxe0", 1, 1  # Soft-RoCE's IPv4 address
BUFFER_BYTES = 1 << 20
AT_ONCE_MAX = 4
LIMIT_S = 120
MTUS = {256: 1, 512: 2, 1024: 3, 2048: 4, 4096: 5}


class Status(Exception):
    """A request that failed, with the status of its completion."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def exploded(gid: str) -> str:
    """The eight groups that pyverbs wants, of what the server writes: ::ffff:1.2.3.4."""
    numbers = [int(number) for number in gid.removeprefix("::ffff:").split(".")]
    last = "".join(f"{number:02x}" for number in numbers)
    return f"{'0000:' * 5}ffff:{last[:4]}:{last[4:]}"


class Client:
    """The initiator's side of a queue pair."""

    def __init__(self) -> None:
        self.context = Context(name=DEVICE)
        self.domain = PD(self.context)
        access = enums.IBV_ACCESS_LOCAL_WRITE
        self.buffer = MR(self.domain, BUFFER_BYTES, access)
        self.completions = CQ(self.context, AT_ONCE_MAX, None, None, 0)
        room = QPCap(max_send_wr=AT_ONCE_MAX, max_recv_wr=1)
        wanted = QPInitAttr(
            qp_type=enums.IBV_QPT_RC, scq=self.completions, rcq=self.completions, cap=room
        )
        self.queue_pair = QP(self.domain, wanted, QPAttr(port_num=PORT))
        self.psn = int.from_bytes(time.time_ns().to_bytes(8, "little")[:3], "little")
        self.lease: dict[str, Any] = {}
        self.theirs: dict[str, Any] = {}

    def half(self) -> dict[str, Any]:
        return {
            "qpn": self.queue_pair.qp_num,
            "psn": self.psn,
            "gid": str(self.context.query_gid(PORT, GID_INDEX).gid),
            "lid": self.context.query_port(PORT).lid,
            "mtu": 4096,
            "link": "ethernet",
        }

    def connect(self, server: Server, lease: dict[str, Any]) -> Client:
        path = f"/v1/leases/{lease['lease']}/queue-pairs"
        status, found = server.ask("POST", path, self.half(), token=lease["token"])
        assert status == 201, found
        self.join(found)
        self.lease = lease
        return self

    def join(self, theirs: dict[str, Any]) -> None:
        route = GlobalRoute(dgid=GID(exploded(theirs["gid"])), sgid_index=GID_INDEX, hop_limit=64)
        attributes = QPAttr(port_num=PORT, path_mtu=MTUS[theirs["mtu"]])
        attributes.ah_attr = AHAttr(is_global=1, port_num=PORT, gr=route)
        attributes.dest_qp_num, attributes.rq_psn = theirs["qpn"], theirs["psn"]
        attributes.sq_psn = self.psn
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
        attributes.min_rnr_timer, attributes.timeout = 12, 14
        attributes.retry_cnt = theirs["retry_count"]
        attributes.rnr_retry = 1
        self.queue_pair.to_rts(attributes)
        self.theirs = theirs

    def write(self, offset: int, data: bytes) -> None:
        self.buffer.write(data, len(data))
        self._do(enums.IBV_WR_RDMA_WRITE, offset, len(data))

    def read(self, offset: int, length: int) -> bytes:
        self._do(enums.IBV_WR_RDMA_READ, offset, length)
        found = self.buffer.read(length, 0)
        assert isinstance(found, bytes)
        return found

    def write_at_once(self, offsets: list[int], length: int) -> None:
        """The buffer's beginning to several places, all of them under way together."""
        for offset in offsets:
            self._post(enums.IBV_WR_RDMA_WRITE, offset, length)
        self._await(len(offsets))

    def _do(self, opcode: int, offset: int, length: int) -> None:
        self._post(opcode, offset, length)
        self._await(1)

    def _post(self, opcode: int, offset: int, length: int) -> None:
        place = SGE(self.buffer.buf, length, self.buffer.lkey)
        request = SendWR(opcode=opcode, num_sge=1, sg=[place])
        request.set_wr_rdma(self.theirs["rkey"], self.theirs["address"] + offset)
        self.queue_pair.post_send(request)

    def _await(self, number: int) -> None:
        end = time.monotonic() + LIMIT_S
        found: list[Any] = []
        while len(found) < number:
            assert time.monotonic() < end, "no completion came"
            found += self.completions.poll(number)[1]
        failed = [one.status for one in found if one.status != enums.IBV_WC_SUCCESS]
        if failed:
            raise Status(failed[0])

    def close(self) -> None:
        self.queue_pair.close()
        self.completions.close()
        self.buffer.close()
        self.domain.close()
        self.context.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
