"""What no honest client sends, to the control port and to the data port.

nbdkit's parser is not ours, but it stands between all tenants: one that makes it abort breaks
everybody's connections.  So an authorized client, too, may send what it likes, and hang up
when it likes, without anybody else noticing.  Our plugin runs under ASan and UBSan here.
FARMEM_TEST_FUZZ_INPUTS=100000 sends that many with each seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.pools.serving import LIMIT_S, MIB, Data, Server, need, serving

pytestmark = pytest.mark.pools
INPUTS = int(os.environ.get("FARMEM_TEST_FUZZ_INPUTS", "400"))
SEEDS = range(3)
PATIENCE_S = 0.01
OFFSETS = (0, 4096, 4 * MIB - 1, 4 * MIB, 1 << 63, (1 << 64) - 1)
LENGTHS = (0, 1, 4096, 65536, 4 * MIB, (1 << 32) - 1)
REQUEST = struct.Struct(">IHHQQI")
MAGIC = 0x25609513
READ, DISCONNECT = 0, 2


class Victim:
    """A tenant who must notice nothing."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.data = Data(server.lease(4 * MIB))
        self.data.write(0, b"kept" * 1024)

    def check(self) -> None:
        assert self.data.read(0, 4096) == b"kept" * 1024
        assert not any(self.data.read(4096, 65536))
        assert self.server.metrics()["data_restarts_total"] == 0, self.server.log


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an `nbdkit` that loads our plugin with sanitizers; what they find ends it."""
    need("nbdkit", "gcc")
    folder = tmp_path_factory.mktemp("sanitized")
    plugin, native = folder / "plugin.so", ROOT / "native"
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-fPIC", "-shared", "-pthread"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o", str(plugin)]
    sources = [str(native / "server" / f"{name}.c") for name in ("nbdkit_plugin", "lease_table")]
    subprocess.run([*command, "-I", str(native / "include"), *sources], check=True)
    libraries = " ".join(
        subprocess.run(
            ["gcc", f"-print-file-name=lib{name}.so"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    )
    wrapper = folder / "nbdkit"
    wrapper.write_text(
        "#!/bin/bash\n"
        f'exec env LD_PRELOAD="{libraries}" ASAN_OPTIONS=detect_leaks=0 '
        f'{shutil.which("nbdkit")} "${{@/*nbdkit-farmem-plugin.so/{plugin}}}"\n'
    )
    wrapper.chmod(0o755)
    return folder


@pytest.fixture
def victim(sanitized: Path) -> Iterator[Victim]:
    path = f"{sanitized}:{os.environ['PATH']}"
    with serving("--quota", "4M", env={"PATH": path}) as server:
        found = Victim(server)
        maps = Path(f"/proc/{server.nbdkit()}/maps").read_text()
        assert str(sanitized / "plugin.so") in maps and "libasan" in maps
        yield found
        found.check()
        found.data.close()


def changed(source: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut out, or put in."""
    words = bytearray(data)
    for _ in range(source.randint(0, 6)):
        at, kind = source.randrange(len(words) + 1), source.random()
        if kind < 0.4 and at < len(words):
            words[at] = source.randrange(256)
        elif kind < 0.6:
            del words[at : at + source.randint(1, 8)]
        elif kind < 0.8:
            words[at:at] = source.randbytes(source.randint(1, 16))
        else:
            words[at : at + 4] = source.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
    return bytes(words)


def handshake(token: str) -> bytes:
    """The client's part of one that succeeds."""
    name = token.encode()
    body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    return struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, len(body)) + body


def request(source: random.Random) -> bytes:
    flags, kind = source.choice((0, 1, 2, 0xFFFF)), source.randint(0, 9)
    offset = source.choice((*OFFSETS, source.randrange(4 * MIB)))
    head = REQUEST.pack(MAGIC, flags, kind, 7, offset, source.choice(LENGTHS))
    return changed(source, head) + source.randbytes(source.choice((0, 1, 4096)))


def send(port: int, data: bytes, *, reads: bool = True) -> None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(PATIENCE_S)
        sock.sendall(data)
        while reads and sock.recv(65536):
            pass


def fuzz(victim: Victim, port: int, make: Callable[[random.Random], bytes], seed: int) -> None:
    source = random.Random(seed)
    for _ in range(INPUTS):
        send(port, make(source), reads=source.random() < 0.7)
    victim.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_data_port(victim: Victim, seed: int) -> None:
    lease = victim.server.lease(4 * MIB, tenant="attacker")
    greeting = handshake(lease["token"])

    def make(source: random.Random) -> bytes:
        if source.random() < 0.4:
            return changed(source, greeting)
        return greeting + b"".join(request(source) for _ in range(source.randint(1, 5)))

    fuzz(victim, lease["nbd"]["port"], make, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_control_port(victim: Victim, seed: int) -> None:
    lease = victim.server.lease(2 * MIB, tenant="attacker")
    heads = (
        b'POST /v1/leases HTTP/1.1\r\nHost: a\r\nContent-Length: 14\r\n\r\n{"bytes": 100}',
        f"DELETE /v1/leases/{lease['lease']} HTTP/1.1\r\nHost: a\r\n".encode()
        + b"Authorization: Bearer x\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
    )
    fuzz(victim, victim.server.port, lambda source: changed(source, source.choice(heads)), seed)
    assert victim.server.renew(lease) == 200


@pytest.mark.parametrize("end", ["rubbish", "disconnect", "reset", "silence"])
def test_clients_that_hang_up_hurt_nobody(victim: Victim, end: str) -> None:
    """In the middle of many answers: with several threads a connection nbdkit 1.32 aborts here."""
    lease = victim.server.lease(4 * MIB, tenant="attacker")
    asked = b"".join(REQUEST.pack(MAGIC, 0, READ, i, 0, 65536) for i in range(40))
    last = {"rubbish": b"x" * 28, "disconnect": REQUEST.pack(MAGIC, 0, DISCONNECT, 0, 0, 0)}
    place = ("127.0.0.1", lease["nbd"]["port"])
    for number in range(60):
        with socket.create_connection(place, LIMIT_S) as sock:
            sock.sendall(handshake(lease["token"]) + asked + last.get(end, b""))
            with contextlib.suppress(OSError):
                sock.recv(number * 1000 + 1)
            if end == "reset":
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    victim.check()
