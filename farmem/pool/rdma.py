"""RDMA with pyverbs: a device, memory that is registered with it, and queue pairs.

The only module that imports pyverbs, and only when a device is opened.  It knows nothing of
leases and HTTP.  A queue pair's numbers and a registration's key are what lets a peer in: they
stand in no message and in no log.
"""

import dataclasses
import ipaddress
import logging
import os
import secrets
import types
from typing import Any, NamedTuple

from farmem.errors import FarmemError

ETHERNET, INFINIBAND = "ethernet", "infiniband"
# A path's MTU in bytes, and what the verbs call it.
MTUS = {256: 1, 512: 2, 1024: 3, 2048: 4, 4096: 5}
NUMBER_BITS = 24  # of a queue pair's number, and of a packet's
RETRIES = 6  # Soft-RoCE takes 7 for "for ever": its peers would never learn that we have gone
QUEUE_PAIRS_MAX = 4096
# How many reads a peer may have under way on a queue pair; each costs the device some memory.
READS_MAX = 16
_HOPS_MAX = 64
_RNR_RETRIES = 6  # 7 would be for ever
_RNR_TIMER = 12  # 0.64 ms
_TIMEOUT = 14  # 67 ms
_GIDS_MAX = 1024  # the kernel takes no larger table than 64 KiB, of 32 bytes each
# Numbers of the verbs' binary interface: pyverbs keeps them in another module in each version.
_RELIABLE = 2
_LOCAL_WRITE, _REMOTE_WRITE, _REMOTE_READ = 1, 2, 4
_STATE_ERROR, _MASK_STATE = 6, 1
_PORT_ACTIVE = 4
_LINK_ETHERNET = 2
_ROCE_V2 = 2
_GID_KINDS = {0: "InfiniBand", 1: "RoCE v1", 2: "RoCE v2"}
_INSTALL = (
    "apt-get install python3-pyverbs, which fits the system's libibverbs, and a virtual "
    "environment with --system-site-packages"
)


class NotThere(FarmemError):
    """This host has nothing to do RDMA with."""


class Failed(Exception):
    """A verb failed; the text is the system's reason."""

    def __init__(self, error: Exception) -> None:
        code = getattr(error, "error_code", -1)
        self.errno = 0 if code == -1 else abs(code)  # -1: pyverbs was given none
        super().__init__(os.strerror(self.errno) if self.errno else "no reason given")


class Half(NamedTuple):
    """One side's half of a queue pair: all that the other side needs."""

    qpn: int
    psn: int
    gid: str
    lid: int
    mtu: int


@dataclasses.dataclass(frozen=True)
class Gid:
    """An address of a port, and its place in the port's table."""

    index: int
    text: str
    kind: int

    def __str__(self) -> str:
        kind = _GID_KINDS.get(self.kind, "of an unknown kind")
        return f"{self.index} ({short_gid(self.text)}, {kind})"


def canonical_gid(text: str) -> str:
    """Eight groups of four digits, as pyverbs wants it; ValueError: it is none."""
    return ipaddress.IPv6Address(text).exploded


def short_gid(text: str) -> str:
    """As people write it: an IPv4 address is seen to be one."""
    address = ipaddress.IPv6Address(text)
    return f"::ffff:{address.ipv4_mapped}" if address.ipv4_mapped else str(address)


def choose_gid(gids: list[Gid], link: str, wanted: int | None) -> Gid:
    """The GID to use: the one that was asked for, else what most peers can reach.

    On Ethernet RoCE v2, which routers forward, over IPv4, else over IPv6 that reaches beyond
    the link; the first of them.
    """

    def rank(gid: Gid) -> tuple[bool, bool, bool, int]:
        address = ipaddress.IPv6Address(gid.text)
        is_plain = link == INFINIBAND
        return (
            not is_plain and gid.kind != _ROCE_V2,
            not is_plain and address.ipv4_mapped is None,
            not is_plain and address.is_link_local,
            gid.index,
        )

    if not gids:
        raise FarmemError(
            "the RDMA device has no address (GID)",
            "give its network interface an IP address, as: ip address add 10.0.0.7/24 dev eth0",
        )
    if wanted is None:
        return min(gids, key=rank)
    for gid in gids:
        if gid.index == wanted:
            return gid
    known = ", ".join(map(str, gids))
    raise FarmemError(f"--rdma-gid-index {wanted}: the device has no such GID", f"it has: {known}")


def _load() -> Any:
    """pyverbs.  Importing it puts a handler on the root logger, which is not its business."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from pyverbs import addr, cq, device, mr, pd, pyverbs_error, qp, wr
    except ModuleNotFoundError as error:
        if error.name != "pyverbs":
            raise FarmemError(f"pyverbs can't be imported: {error}", _INSTALL) from error
        raise NotThere("pyverbs is not installed", _INSTALL) from error
    except ImportError as error:
        raise FarmemError(f"pyverbs can't be imported: {error}", _INSTALL) from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return types.SimpleNamespace(
        addr=addr, cq=cq, device=device, mr=mr, pd=pd, qp=qp, wr=wr,
        Error=pyverbs_error.PyverbsError,
    )  # fmt: skip


def open_adapter(wanted_device: str, wanted_gid: int | None) -> "Adapter":
    """The device that was asked for, else the first with a port that is up."""
    verbs = _load()
    try:
        names = [os.fsdecode(found.name) for found in verbs.device.get_device_list()]
    except verbs.Error:  # the kernel has no RDMA
        names = []
    if not names:
        raise NotThere(
            "this host has no RDMA device",
            "see what `farmem doctor` says of RDMA, or use --rdma=off",
        )
    if wanted_device and wanted_device not in names:
        raise FarmemError(
            f"--rdma-device {wanted_device!r}: there is no such device",
            f"devices are: {', '.join(names)}",
        )
    tried = [wanted_device] if wanted_device else names
    for name in tried:
        context = _open(verbs, name)
        try:
            port = _active_port(context)
            if port:
                return Adapter(verbs, context, name, port, wanted_gid)
        except verbs.Error as error:
            raise FarmemError(f"RDMA device {name} can't be used: {Failed(error)}") from error
        context.close()
    raise FarmemError(
        f"no port of {', '.join(tried)} is active",
        "see what `rdma link` shows, and: ip link set DEVICE up",
    )


def _open(verbs: Any, name: str) -> Any:
    try:
        return verbs.device.Context(name=name)
    except verbs.Error as error:
        raise FarmemError(
            f"RDMA device {name} can't be opened: {Failed(error)}",
            "let this user read and write /dev/infiniband/uverbs*: see `farmem doctor`",
        ) from error


def _active_port(context: Any) -> int:
    """The first port that is up; 0: none."""
    for number in range(1, context.query_device().phys_port_cnt + 1):
        if context.query_port(number).state == _PORT_ACTIVE:
            return number
    return 0


class Adapter:
    """A device, opened, and the port of it that is used."""

    def __init__(
        self, verbs: Any, context: Any, name: str, port: int, wanted_gid: int | None
    ) -> None:
        self.verbs = verbs
        self.context = context
        self.name = name
        self.port = port
        found = context.query_port(port)
        self.link = ETHERNET if found.link_layer == _LINK_ETHERNET else INFINIBAND
        self.lid = int(found.lid)
        self.mtu = {number: mtu for mtu, number in MTUS.items()}[found.active_mtu]
        self.gid = choose_gid(self._gids(), self.link, wanted_gid)
        limits = context.query_device()
        self.queue_pairs_max = max(1, min(limits.max_qp // 2, QUEUE_PAIRS_MAX))
        self.reads_max = max(1, min(limits.max_qp_rd_atom, READS_MAX))
        # Nothing that a peer does to registered memory completes on our side.
        self._cq = verbs.cq.CQ(context, 1, None, None, 0)

    def __str__(self) -> str:
        return f"{self.name}, port {self.port}, GID {self.gid}"

    def _gids(self) -> list[Gid]:
        return [
            Gid(entry.gid_index, canonical_gid(entry.gid_str()), entry.gid_type)
            for entry in self.context.query_gid_table(_GIDS_MAX)
            if entry.port_num == self.port
        ]

    def register(self, address: int, size_bytes: int) -> "Registration":
        """Let peers read and write memory of this process; Failed: the device does not take it."""
        try:
            return Registration(self, address, size_bytes)
        except self.verbs.Error as error:
            raise Failed(error) from error

    def new_queue_pair(self, domain: Any, completions: Any = None, requests: int = 1) -> Any:
        """A queue pair in INIT."""
        qp = self.verbs.qp
        cq = completions or self._cq
        room = qp.QPCap(max_send_wr=requests, max_recv_wr=1)
        wanted = qp.QPInitAttr(qp_type=_RELIABLE, scq=cq, rcq=cq, cap=room, sq_sig_all=1)
        attributes = qp.QPAttr(port_num=self.port)
        attributes.pkey_index = 0
        attributes.qp_access_flags = _LOCAL_WRITE | _REMOTE_WRITE | _REMOTE_READ
        return qp.QP(domain, wanted, attributes)

    def half_of(self, queue_pair: Any, psn: int, mtu: int) -> Half:
        """What the other side must know."""
        return Half(int(queue_pair.qp_num), psn, self.gid.text, self.lid, mtu)

    def join(self, queue_pair: Any, psn: int, theirs: Half) -> None:
        """INIT -> RTR -> RTS, with the other side's half."""
        addr = self.verbs.addr
        route = addr.GlobalRoute(
            dgid=addr.GID(theirs.gid), sgid_index=self.gid.index, hop_limit=_HOPS_MAX
        )
        is_global = self.link == ETHERNET or _subnet(theirs.gid) != _subnet(self.gid.text)
        attributes = self.verbs.qp.QPAttr(port_num=self.port, path_mtu=MTUS[theirs.mtu])
        attributes.ah_attr = addr.AHAttr(
            dlid=theirs.lid, is_global=int(is_global), port_num=self.port, gr=route
        )
        attributes.dest_qp_num = theirs.qpn
        attributes.rq_psn = theirs.psn
        attributes.sq_psn = psn
        attributes.max_dest_rd_atomic = attributes.max_rd_atomic = self.reads_max
        attributes.min_rnr_timer = _RNR_TIMER
        attributes.timeout = _TIMEOUT
        attributes.retry_cnt = RETRIES
        attributes.rnr_retry = _RNR_RETRIES
        queue_pair.to_rts(attributes)

    def cut(self, queue_pair: Any) -> None:
        """To the error state, where no request of the peer's is carried out any more; then away."""
        queue_pair.modify(self.verbs.qp.QPAttr(qp_state=_STATE_ERROR), _MASK_STATE)
        queue_pair.close()

    def close(self) -> None:
        """When all registrations have gone."""
        self._cq.close()
        self.context.close()


def _subnet(gid: str) -> str:
    return gid[: len(gid) // 2]


def new_psn() -> int:
    """Where a side's packet numbers begin: nobody can guess it."""
    return secrets.randbits(NUMBER_BITS)


class Registration:
    """Memory that peers may reach: a protection domain, a registration, and queue pairs."""

    def __init__(self, adapter: Adapter, address: int, size_bytes: int) -> None:
        verbs = adapter.verbs
        self._adapter = adapter
        self._queue_pairs: dict[str, Any] = {}
        self.size_bytes = size_bytes
        self._domain = verbs.pd.PD(adapter.context)
        access = _LOCAL_WRITE | _REMOTE_WRITE | _REMOTE_READ
        try:
            self._region = verbs.mr.MR(self._domain, size_bytes, access, address=address)
        except verbs.Error:
            self._domain.close()
            raise
        self.rkey = int(self._region.rkey)

    def __len__(self) -> int:
        return len(self._queue_pairs)

    def connect(self, name: str, theirs: Half) -> Half:
        """Make a queue pair for a peer: our half.  Failed: there is no way to the peer."""
        adapter = self._adapter
        psn, mtu = new_psn(), min(theirs.mtu, adapter.mtu)
        try:
            made = adapter.new_queue_pair(self._domain)
            try:
                adapter.join(made, psn, theirs._replace(mtu=mtu))
                ours = adapter.half_of(made, psn, mtu)
            except BaseException:
                made.close()
                raise
        except adapter.verbs.Error as error:
            raise Failed(error) from error
        self._queue_pairs[name] = made
        return ours

    def disconnect(self, name: str) -> bool:
        """Take a queue pair away; False: there is none of that name."""
        made = self._queue_pairs.get(name)
        if made is None:
            return False
        try:
            self._adapter.cut(made)
        except self._adapter.verbs.Error as error:
            raise Failed(error) from error
        del self._queue_pairs[name]
        return True

    def close(self) -> None:
        """Behind this the device can't reach the memory any more.

        If a verb fails here, nobody knows whether it can, and the server can't go on.
        """
        try:
            for name in list(self._queue_pairs):
                self.disconnect(name)
            self._region.close()
            self._domain.close()
        except (Failed, self._adapter.verbs.Error) as error:
            why = error if isinstance(error, Failed) else Failed(error)
            raise FarmemError(
                f"{self._adapter.name} does not let go of memory that was lent: {why}",
                "see the kernel's log (dmesg), then start the server again",
            ) from error
