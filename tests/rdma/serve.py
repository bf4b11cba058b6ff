"""Cases of batch.py: `farmem serve` on real verbs, and what its clients may do.

The client (client.py) shares nothing with farmem but the protocol.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from pyverbs import enums

from farmem.doctor import rdma as doctor
from farmem.doctor.findings import Mark
from farmem.doctor.host import Host
from farmem.pool import initiator, rdma
from tests.harness import FARMEM
from tests.pools.serving import MIB, Data, Server, serving, until
from tests.rdma.cases import REQUIRED, case, fails_with, work_in
from tests.rdma.client import AT_ONCE_MAX, Client, Status

SIZE = 8 * MIB
BLOCK = 64 << 10
PAGE = 4096
PAGES = 1000
ROUNDS = 5
SECRET = b"former tenant " * 32
ACCESS_ERROR = enums.IBV_WC_REM_ACCESS_ERR
RETRIES_OVER = enums.IBV_WC_RETRY_EXC_ERR


def said_by(*words: str) -> str:
    """What a server says that does not start."""
    command = [*words, str(FARMEM), "serve", "--capacity", "64M", "--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, *REQUIRED], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 125 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


# ---- the host and the device ---------------------------------------------------------------------


@case
def kernel() -> dict[str, Any]:
    """The unit allows the device by the name of its driver."""
    device = os.stat("/dev/infiniband/uverbs0").st_rdev
    drivers = Path("/proc/devices").read_text().split("Block devices")[0]
    names = {int(line.split()[0]): line.split()[1] for line in drivers.splitlines()[1:] if line}
    return {"release": os.uname().release, "driver": names[os.major(device)]}


@case
def numbers_of_the_verbs() -> None:
    """Those that farmem has written down are pyverbs'."""
    for module, name, number in (
        (rdma, "_RELIABLE", enums.IBV_QPT_RC),
        (rdma, "_LOCAL_WRITE", enums.IBV_ACCESS_LOCAL_WRITE),
        (rdma, "_REMOTE_WRITE", enums.IBV_ACCESS_REMOTE_WRITE),
        (rdma, "_REMOTE_READ", enums.IBV_ACCESS_REMOTE_READ),
        (rdma, "_STATE_ERROR", enums.IBV_QPS_ERR),
        (rdma, "_MASK_STATE", enums.IBV_QP_STATE),
        (rdma, "_PORT_ACTIVE", enums.IBV_PORT_ACTIVE),
        (rdma, "_LINK_ETHERNET", enums.IBV_LINK_LAYER_ETHERNET),
        (rdma, "_ROCE_V2", enums.IBV_GID_TYPE_ROCE_V2),
        (initiator, "_WRITE", enums.IBV_WR_RDMA_WRITE),
        (initiator, "_READ", enums.IBV_WR_RDMA_READ),
        (initiator, "_SIGNALED", enums.IBV_SEND_SIGNALED),
        (initiator, "_SUCCESS", enums.IBV_WC_SUCCESS),
    ):
        assert getattr(module, name) == number, (name, number)
    for size, number in rdma.MTUS.items():
        assert number == getattr(enums, f"IBV_MTU_{size}")


@case
def doctor_tells() -> None:
    host = Host()
    for look in (doctor.look_library, doctor.look_devices, doctor.look_pyverbs):
        answer = look(host)
        assert answer.mark == Mark.OK, (look.__name__, answer)
    assert doctor.look_devices(host).found == "rxe0: ACTIVE"


@case
def refusals_at_the_start() -> None:
    """Root without CAP_IPC_LOCK is held to the limit of locked memory."""
    bound = ("setpriv", "--bounding-set=-ipc_lock", "prlimit", "--memlock=8388608:8388608")
    said = said_by(*bound)
    assert "8.0 MiB of memory may be locked" in said and "LimitMEMLOCK=infinity" in said, said
    said = said_by("env", "FARMEM_SERVE_RDMA_DEVICE=mlx5_0")
    assert "there is no such device" in said and "rxe0" in said, said
    said = said_by("env", "FARMEM_SERVE_RDMA_GID_INDEX=77")
    assert "no such GID" in said and "1 (::ffff:10.99.0.1, RoCE v2)" in said, said


@case
def self_test() -> None:
    command = [str(FARMEM), "serve", "--self-test", "--capacity", "8M", *REQUIRED]

    def run(defect: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "FARMEM_TEST_POOL": defect}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=400, check=False, env=env
        )

    done = run("")
    assert done.returncode == 0, done.stderr
    assert "RDMA through rxe0, port 1, GID 1 (::ffff:10.99.0.1, RoCE v2): 8.0 MiB" in done.stdout
    done = run("punch_pinned")
    assert done.returncode == 125 and "wrong bytes in a hole" in done.stderr, done.stderr


# ---- a server, and what its clients may do -------------------------------------------------------


@case
def write_and_read(server: Server) -> None:
    """One-sidedly in, one-sidedly out, and over NBD: the same bytes everywhere."""
    lease = server.lease(SIZE)
    source = random.Random(7)
    blocks = {at: source.randbytes(BLOCK) for at in range(0, SIZE, BLOCK)}
    with Client() as client, Client() as other:
        client.connect(server, lease)
        other.connect(server, lease)
        assert client.theirs["bytes"] == SIZE and client.theirs["mtu"] == 4096
        for at in random.Random(8).sample(sorted(blocks), len(blocks)):
            client.write(at, blocks[at])
        with Data(lease) as data:
            for at, block in blocks.items():
                assert other.read(at, BLOCK) == block and data.read(at, BLOCK) == block
    server.release(lease)


@case
def nbd_and_rdma_see_one_memory(server: Server) -> None:
    """Also behind a TRIM: pages that a device has are not taken away."""
    lease = server.lease(SIZE)
    with Client() as client, Data(lease) as data:
        data.write(0, b"a" * BLOCK)
        data.trim(BLOCK, BLOCK)
        client.connect(server, lease)
        assert client.read(0, BLOCK) == b"a" * BLOCK and not any(client.read(BLOCK, BLOCK))
        data.trim(0, SIZE)
        assert not any(client.read(0, BLOCK))
        client.write(PAGE, b"b" * PAGE)
        assert data.read(0, 3 * PAGE) == bytes(PAGE) + b"b" * PAGE + bytes(PAGE)
        data.write(PAGE, b"c" * PAGE)
        assert client.read(PAGE, PAGE) == b"c" * PAGE
    server.release(lease)


@case
def other_tenants_are_out_of_reach(server: Server) -> None:
    """Another lease's key, on one's own queue pair; an address outside; a key that is none."""
    mine, other = server.lease(SIZE, tenant="mine"), server.lease(SIZE, tenant="other")
    with Client() as owner:
        owner.connect(server, other)
        owner.write(0, SECRET)
        keys = owner.theirs["rkey"], owner.theirs["address"]
        attempts: list[tuple[int, int, int]] = []
        with Client() as client:
            client.connect(server, mine)
            key, address = client.theirs["rkey"], client.theirs["address"]
            attempts += [(*keys, 0), (key, keys[1], 0), (key ^ 0x100, address, 0)]
            attempts += [(key, address, SIZE), (key, address, -PAGE), (key, address, SIZE - 1)]
        for rkey, remote, offset in attempts:
            for write in (False, True):
                with Client() as client:
                    client.connect(server, mine)
                    client.buffer.write(b"-" * PAGE, PAGE)
                    client.theirs |= {"rkey": rkey, "address": remote}
                    request = (
                        (lambda c=client, o=offset: c.write(o, b"broken" * 100))
                        if write
                        else (lambda c=client, o=offset: c.read(o, PAGE))
                    )
                    status = fails_with(request)
                    assert status == ACCESS_ERROR, (rkey == key, offset, write, status)
                    if not write:
                        assert client.buffer.read(PAGE, 0) == b"-" * PAGE
        assert owner.read(0, len(SECRET)) == SECRET
        assert not any(owner.read(PAGE, BLOCK))
    server.release(mine)
    server.release(other)


@case
def tokens_count(server: Server) -> None:
    lease, other = server.lease(SIZE), server.lease(SIZE)
    path = f"/v1/leases/{lease['lease']}/queue-pairs"
    with Client() as client:
        for token in ("", "0" * 64, other["token"]):
            assert server.ask("POST", path, client.half(), token=token)[0] == 401
    assert server.metrics()["rdma_registered_bytes"] == 0
    server.release(lease)
    server.release(other)


@case
def a_queue_pair_that_was_taken_away(server: Server) -> None:
    lease = server.lease(SIZE)
    with Client() as client, Client() as other:
        client.connect(server, lease)
        other.connect(server, lease)
        client.write(0, b"x")
        name = client.theirs["queue_pair"]
        path = f"/v1/leases/{lease['lease']}/queue-pairs/{name}"
        assert server.ask("DELETE", path, token=lease["token"])[0] == 204
        assert fails_with(lambda: client.read(0, 1)) == RETRIES_OVER
        assert other.read(0, 1) == b"x"
    server.release(lease)


@case
def peers_that_are_not_there(server: Server) -> None:
    """A half that nobody answers for costs its owner alone, whether the kernel notices or not."""
    lease = server.lease(SIZE)
    path = f"/v1/leases/{lease['lease']}/queue-pairs"
    with Client() as client:
        far = {**client.half(), "gid": "::ffff:192.0.2.1"}
        status, found = server.ask("POST", path, far, token=lease["token"])
        assert status == 201 or "no way to your queue pair" in found["error"], found
        client.connect(server, lease)
        client.write(0, b"x")
    server.release(lease)


@case
def the_server_does_nothing_per_page(server: Server) -> dict[str, Any]:
    """Its threads are not even woken, while the device's own counters see every page."""
    lease = server.lease(SIZE)
    read = 'data_requests_total{kind="read"}'

    with Client() as client:
        client.connect(server, lease)

        def move() -> None:
            for number in range(PAGES):
                at = number * PAGE % SIZE
                client.write(at, number.to_bytes(4, "little") * (PAGE // 4))
                assert client.read(at, 4) == number.to_bytes(4, "little")

        requests = server.metrics()[read]
        begin = time.monotonic()
        moving = work_in(server, move)
        taken = time.monotonic() - begin
        idle = work_in(server, lambda: time.sleep(taken))
        requests = server.metrics()[read] - requests
    server.release(lease)
    return {"pages": PAGES, "moving": moving, "idle": idle, "requests": requests}


# ---- the end of a lease --------------------------------------------------------------------------


def still_reaches(server: Server) -> bool:
    """Whether a queue pair of a lease that has ended can read what was there."""
    lease = server.lease(SIZE)
    with Client() as client:
        client.connect(server, lease)
        client.write(0, SECRET)
        server.release(lease)
        until(lambda: server.metrics()["clearing_bytes"] == 0, "the memory")
        try:
            return client.read(0, len(SECRET)) == SECRET
        except Status as found:
            assert found.status == RETRIES_OVER
            return False


@case
def a_lease_that_ended() -> None:
    """No way in, nothing registered, and nothing of it where the next lease lies."""
    env = {"FARMEM_TEST_POOL": "space=8M"}
    with serving(*REQUIRED, capacity="8M", env=env) as server:
        assert not still_reaches(server)
        metrics = server.metrics()
        assert metrics["rdma_queue_pairs"] == metrics["rdma_registered_bytes"] == 0
        assert metrics["used_bytes"] == 0
        lease = server.lease(SIZE)
        with Client() as client:
            client.connect(server, lease)
            for at in range(0, SIZE, MIB):
                assert not any(client.read(at, MIB))


@case
def writes_under_way_when_a_lease_ends() -> None:
    """However many are: none arrives where the next lease lies."""
    env = {"FARMEM_TEST_POOL": "space=8M"}
    with serving(*REQUIRED, capacity="8M", env=env) as server:
        for _ in range(ROUNDS):
            lease = server.lease(SIZE)
            with Client() as client:
                client.connect(server, lease)
                client.buffer.write(SECRET * 8, len(SECRET) * 8)
                ending = threading.Thread(target=server.release, args=(lease,))
                written = 0
                with contextlib.suppress(Status):
                    while True:
                        places = [(written + n) * PAGE % SIZE for n in range(AT_ONCE_MAX)]
                        client.write_at_once(places, len(SECRET) * 8)
                        written += AT_ONCE_MAX
                        if written == 10 * AT_ONCE_MAX:
                            ending.start()
                ending.join()
                until(lambda: server.metrics()["clearing_bytes"] == 0, "the memory")
            again = server.lease(SIZE)
            with Data(again) as data:
                for at in range(0, SIZE, MIB):
                    assert not any(data.read(at, MIB))
            server.release(again)
            until(lambda: server.metrics()["clearing_bytes"] == 0, "the memory")


@case
def huge_pages() -> None:
    """Lent, written, read, and given back: the kernel has them all again."""
    Path("/proc/sys/vm/nr_hugepages").write_text("4")
    with serving(*REQUIRED, "--huge-pages", capacity="8M") as server:
        for _ in range(2):
            lease = server.lease(SIZE)
            with Client() as client, Data(lease) as data:
                client.connect(server, lease)
                assert not any(client.read(SIZE - BLOCK, BLOCK))
                client.write(SIZE - BLOCK, b"h" * BLOCK)
                assert data.read(SIZE - BLOCK, BLOCK) == b"h" * BLOCK
                data.trim(0, SIZE)
                assert not any(client.read(SIZE - BLOCK, BLOCK))
                client.write(0, b"h" * BLOCK)
            server.release(lease)
            until(lambda: server.metrics()["clearing_bytes"] == 0, "the memory")
        assert server.about()["free_bytes"] == SIZE
    Path("/proc/sys/vm/nr_hugepages").write_text("0")


@case
def a_registration_that_is_kept_is_found() -> None:
    with serving(*REQUIRED, env={"FARMEM_TEST_POOL": "keep_registration"}) as server:
        assert still_reaches(server)


@case
def a_server_that_is_killed() -> None:
    """The kernel takes its queue pairs away: the client is told, and never gets other bytes."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(*REQUIRED))
        lease = server.lease(SIZE)
        client = stack.enter_context(Client())
        client.connect(server, lease)
        client.write(0, SECRET)
        server.process.kill()
        server.process.wait()
        assert fails_with(lambda: client.read(0, 1)) == RETRIES_OVER
