"""A pyverbs without a kernel behind it, for tests on hosts without RDMA.

Only what farmem/pool uses of it, under the names and with the arguments that pyverbs has.  Queue
pairs are of this one process; a request is carried out when it is posted, and what a device
checks (states, numbers, keys, ranges, protection domains, access) is checked.  What happens is
noted in `world.events`.  The folder above is put on the module search path by who wants it.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import sys
from types import SimpleNamespace
from typing import Any

RESET, INIT, RTR, RTS, ERROR = 0, 1, 2, 3, 6
SUCCESS, LENGTH_ERROR, ACCESS_ERROR, RETRIES_OVER = 0, 1, 10, 12
REMOTE_WRITE, REMOTE_READ = 2, 4
WRITE, READ = 0, 4
REGISTRATIONS_FIRST = 0x5EC2E700


class PyverbsError(Exception):
    """As pyverbs': an errno, or -1."""

    def __init__(self, message: str, error_code: int = -1) -> None:
        super().__init__(message)
        self.error_code = error_code


class World:
    """What there is.  FAKE_VERBS=VERB:ERRNO,... makes verbs fail, FAKE_VERBS=none is no device."""

    def __init__(self) -> None:
        words = os.environ.get("FAKE_VERBS", "").split(",")
        self.devices = [] if "none" in words else ["fake0"]
        self.failing = {
            word.partition(":")[0]: int(word.partition(":")[2]) for word in words if ":" in word
        }
        self.events: list[str] = []
        self.queue_pairs: dict[int, QP] = {}
        self.regions: dict[int, MR] = {}
        self.numbers = itertools.count(100)
        self.ports = [SimpleNamespace(state=4, link_layer=2, lid=0, active_mtu=5)]
        self.gids = [
            ("fe80:0000:0000:0000:0000:0000:0000:0001", 2),
            ("0000:0000:0000:0000:0000:ffff:7f00:0001", 1),
            ("0000:0000:0000:0000:0000:ffff:7f00:0001", 2),
        ]

    def verb(self, name: str) -> None:
        """Note it; raise if it is to fail."""
        self.events.append(name)
        if name in self.failing:
            raise PyverbsError(f"{name} fails", self.failing[name])


world = World()


def get_device_list() -> list[Any]:
    if not world.devices:
        raise PyverbsError("Failed to get devices list")
    return [SimpleNamespace(name=name.encode()) for name in world.devices]


class Context:
    def __init__(self, name: str) -> None:
        world.verb("open")
        self.name = name

    def query_device(self) -> Any:
        return SimpleNamespace(max_qp=64, max_qp_rd_atom=128, phys_port_cnt=len(world.ports))

    def query_port(self, number: int) -> Any:
        return world.ports[number - 1]

    def query_gid_table(self, _most: int) -> list[Any]:
        return [
            SimpleNamespace(gid_index=index, port_num=1, gid_type=kind, gid_str=lambda t=text: t)
            for index, (text, kind) in enumerate(world.gids)
        ]

    def close(self) -> None:
        world.verb("close")


class PD:
    def __init__(self, _context: Context) -> None:
        world.verb("alloc_pd")
        self.users = 0

    def close(self) -> None:
        if self.users:
            raise PyverbsError("Failed to dealloc PD", errno.EBUSY)
        world.verb("dealloc_pd")


class MR:
    def __init__(self, pd: PD, length: int = 0, access: int = 0, address: int = 0) -> None:
        world.verb("reg_mr")
        self.pd, self.length, self.access, self.address = pd, length, access, address
        self.lkey = self.rkey = REGISTRATIONS_FIRST + next(world.numbers)
        world.regions[self.rkey] = self
        pd.users += 1

    def close(self) -> None:
        world.verb("dereg_mr")
        del world.regions[self.rkey]
        self.pd.users -= 1

    def reaches(self, pd: PD, access: int, address: int, length: int) -> bool:
        inside = self.address <= address and address + length <= self.address + self.length
        return self.pd is pd and bool(self.access & access) and inside


class CQ:
    def __init__(self, _context: Context, _cqe: int, *_others: object) -> None:
        self.found: list[Any] = []

    def poll(self, most: int) -> tuple[int, list[Any]]:
        now, self.found = self.found[:most], self.found[most:]
        return len(now), now

    def close(self) -> None:
        pass


class QPCap:
    def __init__(self, max_send_wr: int, max_recv_wr: int) -> None:
        assert max_send_wr > 0 and max_recv_wr >= 0


class QPInitAttr:
    def __init__(self, qp_type: int, scq: CQ, rcq: CQ, cap: QPCap, sq_sig_all: int) -> None:
        assert qp_type == 2 and scq is rcq and sq_sig_all == 1 and cap
        self.completions = scq


class QPAttr:
    def __init__(self, qp_state: int = INIT, port_num: int = 1, path_mtu: int = 3) -> None:
        self.qp_state, self.port_num, self.path_mtu = qp_state, port_num, path_mtu
        self.dest_qp_num = self.rq_psn = self.sq_psn = -1
        self.qp_access_flags = 0
        self.ah_attr: Any = None


class QP:
    def __init__(self, pd: PD, init: QPInitAttr, attributes: QPAttr) -> None:
        world.verb("create_qp")
        assert attributes.port_num == 1
        self.pd, self.completions = pd, init.completions
        self.access = attributes.qp_access_flags
        self.qp_num = next(world.numbers)
        self.state = INIT
        self.joined: QPAttr | None = None
        world.queue_pairs[self.qp_num] = self
        pd.users += 1

    def to_rts(self, attributes: QPAttr) -> None:
        world.verb("to_rts")
        assert self.state == INIT and attributes.ah_attr.is_global
        assert min(attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn) >= 0
        self.state, self.joined = RTS, attributes

    def modify(self, attributes: QPAttr, mask: int) -> None:
        assert (attributes.qp_state, mask) == (ERROR, 1)
        world.verb("to_error")
        self.state = ERROR

    def close(self) -> None:
        if world.queue_pairs.pop(self.qp_num, None) is None:
            return
        world.verb("destroy_qp")
        self.pd.users -= 1

    def post_send(self, request: SendWR) -> None:
        if self.state != RTS:
            raise PyverbsError("Failed to post send", errno.EINVAL)
        status = self._carried_out(request)
        if status != SUCCESS:
            self.state = ERROR
        self.completions.found.append(SimpleNamespace(status=status))

    def _carried_out(self, request: SendWR) -> int:
        place = request.place
        mine = world.regions[place.lkey]
        if not mine.reaches(self.pd, 1, place.address, place.length):
            return LENGTH_ERROR
        assert self.joined
        other = world.queue_pairs.get(self.joined.dest_qp_num)
        if other is None or other.state != RTS or other.joined is None:
            return RETRIES_OVER
        if other.joined.dest_qp_num != self.qp_num or other.joined.rq_psn != self.joined.sq_psn:
            return RETRIES_OVER
        wanted = REMOTE_WRITE if request.opcode == WRITE else REMOTE_READ
        theirs = world.regions.get(request.rkey)
        if not (
            theirs
            and other.access & wanted
            and theirs.reaches(other.pd, wanted, request.remote, place.length)
        ):
            other.state = ERROR
            return ACCESS_ERROR
        pair = (request.remote, place.address)
        ctypes.memmove(*(pair if request.opcode == WRITE else pair[::-1]), place.length)
        return SUCCESS


class GID:
    def __init__(self, text: str) -> None:
        groups = text.split(":")
        assert len(groups) == 8 and all(len(group) == 4 for group in groups), text


class GlobalRoute:
    def __init__(self, dgid: GID, sgid_index: int, hop_limit: int) -> None:
        assert dgid and sgid_index < len(world.gids) and hop_limit > 1


class AHAttr:
    def __init__(self, dlid: int, is_global: int, port_num: int, gr: GlobalRoute) -> None:
        assert gr and port_num == 1 and dlid >= 0
        self.is_global = is_global


class SGE:
    def __init__(self, address: int, length: int, lkey: int) -> None:
        self.address, self.length, self.lkey = address, length, lkey


class SendWR:
    def __init__(self, opcode: int, num_sge: int, sg: list[SGE], send_flags: int) -> None:
        assert num_sge == 1 and send_flags == 2 and opcode in (WRITE, READ)
        self.opcode, self.place = opcode, sg[0]
        self.rkey = self.remote = 0

    def set_wr_rdma(self, rkey: int, address: int) -> None:
        self.rkey, self.remote = rkey, address


for _name in ("addr", "cq", "device", "mr", "pd", "pyverbs_error", "qp", "wr"):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[__name__]
    globals()[_name] = sys.modules[__name__]
