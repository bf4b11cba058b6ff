"""Other people's tools on our server: libnbd's (nbdinfo, nbdcopy, its Python module) and qemu-io.

None of them was written with farmem in mind, so what they agree with is the NBD protocol.
All bytes are checked.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pools.serving import LIMIT_S, MIB, TCP, UNIX, Server, need, serving

pytestmark = pytest.mark.pools
WAYS = [TCP, UNIX]
SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    need(words[0])
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0 or not check, done.stderr
    return done


def libnbd(script: str, *uris: str) -> None:
    """A script for libnbd; a and b are connections to the first and second URI.

    It is what nbdsh would run, in the Python that the distribution's libnbd is made for.
    """
    if run(SYSTEM_PYTHON, "-c", "import nbd", check=False).returncode != 0:
        pytest.skip("libnbd for Python is not installed (python3-libnbd)")
    lines = ["import nbd"]
    for name, uri in zip("ab", uris, strict=False):
        lines += [f"{name} = nbd.NBD()", f"{name}.connect_uri({uri!r})"]
    done = run(SYSTEM_PYTHON, "-c", "\n".join([*lines, script]), check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_nbdinfo_sees_what_clients_rely_on(server: Server, way: str) -> None:
    lease = server.lease(3 * MIB, way)
    found = json.loads(run("nbdinfo", "--json", server.uri(lease)).stdout)["exports"][0]
    assert found["export-size"] == lease["bytes"] == 4 * MIB
    assert not found["is_read_only"]
    wanted = ("can_multi_conn", "can_trim", "can_flush", "can_zero", "can_fast_zero", "can_fua")
    assert {key: found[key] for key in wanted} == dict.fromkeys(wanted, True)
    server.release(lease)


@pytest.mark.parametrize("way", WAYS)
def test_nbdcopy_brings_back_what_it_took(server: Server, way: str, tmp_path: Path) -> None:
    """Many connections, many requests in flight."""
    lease = server.lease(32 * MIB, way)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(32 * MIB))
    run("nbdcopy", str(source), server.uri(lease))
    run("nbdcopy", server.uri(lease), str(target))
    assert source.read_bytes() == target.read_bytes()
    server.release(lease)


@pytest.mark.parametrize("way", WAYS)
def test_what_one_connection_has_written_another_reads(server: Server, way: str) -> None:
    """What multi-connection promises; and the edges of pages, of extents and of the export."""
    lease = server.lease(4 * MIB, way)
    script = """
import os
size = a.get_size()
edges = [0, 1, 511, 4095, 4096, 2097151, 2097152, size - 5000]
for at in edges:
    data = os.urandom(5000)
    a.pwrite(data, at)
    a.flush()
    assert b.pread(5000, at) == data, at
for at in edges:
    a.pwrite(b"x" * 5000, at)
    a.trim(4000, at + 500) if at % 2 else a.zero(4000, at + 500)
    assert b.pread(5000, at) == b"x" * 500 + bytes(4000) + b"x" * 500, at
assert b.pread(4096, size // 4) == bytes(4096)
"""
    libnbd(script, server.uri(lease), server.uri(lease))
    server.release(lease)


def test_what_lies_outside_is_refused(server: Server) -> None:
    """Two leases side by side: no request reaches over the end of its own."""
    lease, other = server.lease(2 * MIB), server.lease(2 * MIB)
    script = """
a.set_strict_mode(0)
size = a.get_size()
b.pwrite(b"b" * size, 0)
def refused(call):
    try:
        call()
    except nbd.Error:
        return True
assert refused(lambda: a.pread(4096, size))
assert refused(lambda: a.pread(4096, size - 1))
assert refused(lambda: a.pread(512, 2**63))
assert refused(lambda: a.pwrite(b"a" * 4096, size - 4095))
assert refused(lambda: a.pwrite(b"a" * 4096, 2**64 - 4096))
assert refused(lambda: a.trim(4096, size)) and refused(lambda: a.zero(size, 1))
assert b.pread(size, 0) == b"b" * size
assert a.pread(size, 0) == bytes(size)
"""
    libnbd(script, server.uri(lease), server.uri(other))
    server.release(lease)
    server.release(other)


@pytest.mark.parametrize("way", WAYS)
def test_qemu_io(server: Server, way: str) -> None:
    need("qemu-io")
    lease = server.lease(16 * MIB, way)
    commands = [
        "write -P 0xab 0 8M",
        "write -P 0x5c 3145733 70001",
        "read -P 0xab 0 3145733",
        "read -P 0x5c 3145733 70001",
        "read -P 0xab 3215734 4M",
        "discard 1M 1M",
        "read -P 0 1M 1M",
        "write -z 5M 64k",
        "read -P 0 5M 64k",
        "read -P 0 8M 8M",
        "flush",
    ]
    words = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", "-f", "raw", *words, server.uri(lease))
    assert "Pattern verification failed" not in done.stdout, done.stdout
    assert done.stdout.count("bytes at offset") == len(commands) - 1, done.stdout
    server.release(lease)


@pytest.mark.parametrize("way", WAYS)
def test_exports_are_not_listed(server: Server, way: str) -> None:
    """Not even to whoever has a lease: names are secrets."""
    lease = server.lease(2 * MIB, way)
    nobody = server.uri({"nbd": {**lease["nbd"], "export": ""}})
    listed = run("nbdinfo", "--list", "--json", nobody, check=False)
    assert lease["token"] not in listed.stdout + listed.stderr
    exports: list[Any] = json.loads(listed.stdout)["exports"] if listed.stdout else []
    assert exports == []
    server.release(lease)


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_export_is_refused(server: Server, way: str) -> None:
    lease = server.lease(2 * MIB, way)
    token = lease["token"]
    before = server.metrics()["data_refused_total"]
    wrong = [
        "", "0", token[:-1], token + "0", token.upper() if token.upper() != token else "A" * 64,
        token[:-1] + ("0" if token[-1] != "0" else "1"), "0" * 64, lease["lease"], "x" * 4000,
    ]  # fmt: skip
    for name in wrong:
        uri = server.uri({"nbd": {**lease["nbd"], "export": name}})
        assert run("nbdinfo", uri, check=False).returncode != 0, name
    assert server.metrics()["data_refused_total"] - before >= len(wrong) - 1  # "" goes no further
    server.release(lease)
