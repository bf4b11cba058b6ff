"""RDMA: its library, its devices, and pyverbs.  All of it is optional.

Nothing of it is loaded into the doctor: the library may print, and importing pyverbs puts
a handler on the root logger.  A child does it and tells.
"""

import re

from farmem.doctor.findings import Answer, Check, missing, ok, warning
from farmem.doctor.host import Host, Ran

_FOLDER = "/sys/class/infiniband"
_INSTALL = "sudo apt-get install libibverbs1 ibverbs-providers"
_LOAD = 'import ctypes; ctypes.CDLL("libibverbs.so.1")'
_IMPORT = "import pyverbs.device"


def _last_words(ran: Ran) -> str:
    """The end of a traceback, without the name of the error's class."""
    return re.sub(r"^\w*(?:Error|Exception): ", "", ran.last_line())


def look_library(host: Host) -> Answer:
    """libibverbs is loaded at run time, never linked."""
    ran = host.python(_LOAD)
    if ran.status == 0:
        return ok("libibverbs.so.1 can be loaded")
    return missing(_last_words(ran), _INSTALL)


def _port_states(host: Host, device: str) -> list[str]:
    """As "4: ACTIVE" is written."""
    ports = f"{_FOLDER}/{device}/ports"
    states = [host.read(f"{ports}/{port}/state") for port in host.names_in(ports)]
    return [state.rpartition(" ")[2] for state in states]


def look_devices(host: Host) -> Answer:
    """Devices, the state of their ports, and whether this user may open them."""
    states = {name: _port_states(host, name) for name in host.names_in(_FOLDER)}
    if not states:
        return missing(
            "none in /sys/class/infiniband",
            "with a card: load its driver (mlx5_ib, say) and install rdma-core",
            "without one, to try: sudo modprobe rdma_rxe && "
            "sudo rdma link add rxe0 type rxe netdev eth0",
        )
    found = "; ".join(f"{name}: {', '.join(ports) or 'no ports'}" for name, ports in states.items())
    closed = [name for name in _nodes(host) if not host.may_use(name)]
    values = {"devices": states}
    if not _nodes(host):
        return warning(f"{found}; no /dev/infiniband/uverbs*", "sudo modprobe ib_uverbs", **values)
    if closed:
        mend = f"let this user open them: sudo chmod 666 {' '.join(closed)}"
        return warning(f"{found}; not for this user: {', '.join(closed)}", mend, **values)
    if not any("ACTIVE" in ports for ports in states.values()):
        mend = "see what rdma link shows, and: sudo ip link set DEVICE up"
        return warning(f"{found}: no port is active", mend, **values)
    return ok(found, **values)


def _nodes(host: Host) -> list[str]:
    names = host.names_in("/dev/infiniband")
    return [f"/dev/infiniband/{name}" for name in names if name.startswith("uverbs")]


def look_pyverbs(host: Host) -> Answer:
    """The pool server's way to the verbs."""
    install = (
        "sudo apt-get install python3-pyverbs, which fits the system's libibverbs, "
        "and a virtual environment with --system-site-packages"
    )
    if not host.has_module("pyverbs"):
        return missing("not installed", install)
    ran = host.python(_IMPORT)
    if ran.status == 0:
        return ok("can be imported")
    return missing(f"can't be imported: {_last_words(ran)}", install)


OPTIONAL = (
    Check("rdma_library", "RDMA: libibverbs", look_library),
    Check("rdma_devices", "RDMA: devices", look_devices),
    Check("pyverbs", "RDMA: pyverbs", look_pyverbs),
)
