"""What no honest client sends, to the control port and to the data port.

nbdkit's parser is not ours, but it stands between all tenants: one that makes it abort breaks
everybody's connections.  So an authorized client, too, may send what it likes, and hang up
when it likes, without anybody else noticing.  Our plugin runs under ASan and UBSan here.
FARMEM_TEST_FUZZ_INPUTS=100000 sends that many with each seed.

In corpus/ lies what is worth sending every time: for each line of the control plane that it takes
some input to reach, the shortest that was found; and for the data port what the protocol allows,
what it nearly allows, and what has hurt nbdkit once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
SIMPLE_REPLY = rb"\x67\x44\x66\x98(....)"  # and its error


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
        assert "Traceback" not in self.server.log, self.server.log


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
    words = ("--quota", "4M", "--registry", "--ttl", "3600s")  # nobody renews anything
    with serving(*words, env={"PATH": path}) as server:
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


JSON = (
    '{"bytes": 100}', '{"bytes": 1048576, "job": "a", "tenant": "attacker"}', '{"bytes": -1}',
    '{"bytes": 1e300}', '{"bytes": true}', '{"bytes": 99999999999999999999999}',
    '{"bytes": 1, "job": 7}', '{"bytes": 1, "job": "\\u0000"}', '{"bytes": 1, "tenant": "\\ud800"}',
    '{"bytes": ' + "9" * 5000 + "}", "[" * 3000, "{}", "[]", "null", "", '"bytes"',
    '{"url": "tcp://a:1", "name": "a", "epoch": "00", "capacity_bytes": 1, "free_bytes": 1, '
    '"ttl_ns": 2000000000}',
    '{"url": "file:/etc/passwd", "name": 7, "ttl_ns": 0}',
)  # fmt: skip
PATHS = (
    "/healthz", "/metrics", "/v1/server", "/v1/leases", "/v1/leases/{lease}",
    "/v1/leases/{lease}/renew", "/v1/leases/{lease}/queue-pairs",
    "/v1/leases/{lease}/queue-pairs/0a", "/v1/leases/0a/renew", "/v1/registry",
    "/v1/registry/0a1b", "/v1/registry/{lease}", "/", "//", "*", "/v1/leases/../leases", "/%00",
    "/v1/leases?x=1", "http://elsewhere/healthz",
)  # fmt: skip
METHODS = ("GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "CONNECT", "get", "G T")
HEADERS = (
    "Host: a", "Host: b", "Authorization: Bearer {token}", "Authorization: Bearer " + "0" * 64,
    "Authorization: Basic x", "Authorization: Bearer", "Origin: http://page",
    "Expect: 100-continue", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip",
    "Content-Length: 3", "Content-Length: -1", "Content-Length: 99999999999", "Connection: close",
    "X: " + "y" * 20000, "Upgrade: websocket", " folded: x", "A: \0",
)  # fmt: skip


def control_request(source: random.Random, lease: dict[str, Any]) -> bytes:
    """One that is understood, mostly; some of it may make no sense."""
    body = source.choice(JSON).encode()
    headers = source.sample(HEADERS, source.randint(0, 4))
    if source.random() < 0.8:
        headers += ["Host: a", "Authorization: Bearer {token}"]
    if source.random() < 0.8:
        headers.append(f"Content-Length: {len(body)}")
    version = source.choice(("1.1", "1.1", "1.1", "1.0", "9.9"))
    head = f"{source.choice(METHODS)} {source.choice(PATHS)} HTTP/{version}\r\n"
    head += "".join(f"{line}\r\n" for line in headers) + "\r\n"
    head = head.replace("{lease}", lease["lease"]).replace("{token}", lease["token"])
    return head.encode() + body


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

    def make(source: random.Random) -> bytes:
        found = control_request(source, lease)
        return changed(source, found) if source.random() < 0.5 else found

    fuzz(victim, victim.server.port, make, seed)


def corpus(name: str) -> list[dict[str, Any]]:
    found = json.loads((Path(__file__).parent / "corpus" / f"{name}.json").read_text())
    assert isinstance(found, list) and found
    return found


def all_that_comes(port: int, data: bytes) -> bytes:
    """Until the server hangs up, which it may do before it has read everything."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        with contextlib.suppress(OSError):  # it has hung up
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(65536):
                found += part
    return found


def test_the_corpus_of_the_data_port(victim: Victim) -> None:
    for known in corpus("data"):
        lease = victim.server.lease(4 * MIB, tenant="attacker")
        token = lease["token"]
        sent = bytes.fromhex(known["sent"])
        sent = sent.replace(b"T" * len(token), token.encode())
        sent = sent.replace(b"U" * len(token), token.upper().encode())
        came = all_that_comes(lease["nbd"]["port"], sent)
        errors = [int.from_bytes(found, "big") for found in re.findall(SIMPLE_REPLY, came, re.S)]
        assert known["errors"] in (None, errors), (known["name"], came)
        victim.server.release(lease)
        victim.check()


def test_the_corpus_of_the_control_port(victim: Victim) -> None:
    for known in corpus("control"):
        lease = victim.server.lease(2 * MIB, tenant="attacker")
        sent = known["sent"].replace("{lease}", lease["lease"]).replace("{token}", lease["token"])
        sent = sent.replace("{long}", "y" * 20000).replace("{body}", "x" * 70000)
        came = all_that_comes(victim.server.port, sent.encode("latin-1"))
        statuses = re.findall(rb"^HTTP/1.1 (\d+)", came, re.M)
        assert statuses and int(statuses[-1]) == known["status"], (known, came)
        with contextlib.suppress(AssertionError):  # what was sent may have ended it
            victim.server.release(lease)
        victim.check()


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
