"""A `farmem serve` with RDMA that is none: the control channel in Python, the memory in a file that
the fake verbs (native/tests/fake_verbs.c) read and write.

The agent of the job loads the fake verbs instead of libibverbs.  What they do is counted in the
file's head (native/tests/fake_fabric.h), and what is to go wrong is said there.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.native_build import build_native
from tests.pools.fake_serve import FakeServe

MAGIC = 0x636972626166
WORDS = (
    *("magic", "rkey", "address", "bytes", "seed", "fail_ppm", "delay_ns_max", "silent"),
    *("retry_ns", "wrong", "reads", "writes", "failures", "doorbells"),
)
WELL, NO_DEVICE, PORT_DOWN, NO_GID, NO_LOCKED_MEMORY = range(5)
HALVES, HALF_BYTES, HALVES_AT, MEMORY_AT = 1023, 64, 512, 131072
GID = "::ffff:10.0.0.2"
ADDRESS = 0x7F0000000000


class Fabric:
    """The file, its words by their names."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        with path.open("wb") as file:
            file.truncate(MEMORY_AT + size_bytes)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), MEMORY_AT)
        self["rkey"], self["address"] = secrets.randbits(32), ADDRESS
        self["bytes"], self["seed"], self["retry_ns"] = size_bytes, 1, 100_000_000
        self["magic"] = MAGIC

    def __getitem__(self, word: str) -> int:
        found: int = struct.unpack_from("<Q", self._map, WORDS.index(word) * 8)[0]
        return found

    def __setitem__(self, word: str, value: int) -> None:
        struct.pack_into("<Q", self._map, WORDS.index(word) * 8, value)

    def connect(self, place: int, *half: int) -> None:
        """A half of a queue pair: its number and PSN, and the peer's."""
        at = HALVES_AT + place * HALF_BYTES
        struct.pack_into("<QQQQQ", self._map, at, 0, *half)
        struct.pack_into("<Q", self._map, at, 1)

    def disconnect(self, place: int) -> None:
        struct.pack_into("<Q", self._map, HALVES_AT + place * HALF_BYTES, 0)


class FakeRdmaServe(FakeServe):
    """Leases with queue pairs."""

    def __init__(self, fabric: Fabric, size_bytes: int) -> None:
        super().__init__({}, size_bytes)
        self.fabric = fabric
        self.url = self.url.replace("tcp:", "rdma:")
        self.has_rdma = True
        self.queue_pairs: dict[str, int] = {}  # by name: place
        self.made = 0
        self.numbers: list[int] = []  # secrets: qpn and psn of all of them
        self.changes: dict[str, Any] = {}  # of what the next answers say
        self.refusal: tuple[int, dict[str, str]] | None = None

    def _lease(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, given = super()._lease(body)
        return status, {**given, "rdma": {}} if status == 201 and self.has_rdma else given

    def _of_lease(self, method: str, lease: str, token: str) -> tuple[int, dict[str, Any]]:
        path, body = self.asked[-1][1:]
        parts = path.split("/")
        if len(parts) < 5 or parts[4] != "queue-pairs":
            answer = super()._of_lease(method, lease, token)
            if method == "DELETE" and answer[0] == 204:
                self.end_queue_pairs()
            return answer
        status, refused = super()._of_lease("POST", lease, token)
        self.renewals -= status == 200
        if status != 200:
            return status, refused
        if method == "DELETE":
            place = self.queue_pairs.pop(parts[5], None)
            if place is None:
                return 404, {"error": "there is no such queue pair", "hint": ""}
            self.fabric.disconnect(place)
            return 204, {}
        return self.refusal or self._queue_pair(body)

    def end_queue_pairs(self) -> None:
        for place in self.queue_pairs.values():
            self.fabric.disconnect(place)
        self.queue_pairs.clear()

    def _queue_pair(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert asked["gid"] == "::ffff:10.0.0.1" and asked["link"] == "ethernet"
        place, name = self.made % HALVES, secrets.token_hex(8)
        self.made += 1
        qpn, psn = 0x900000 + self.made, secrets.randbits(24)
        self.fabric.connect(place, qpn, psn, asked["qpn"], asked["psn"])
        self.queue_pairs[name] = place
        self.numbers += [qpn, psn, asked["qpn"], asked["psn"]]
        half = {"queue_pair": name, "qpn": qpn, "psn": psn, "gid": GID, "lid": 0, "mtu": 1024}
        memory = {key: self.fabric[key] for key in ("rkey", "address", "bytes")}
        return 201, {**half, **memory, "retry_count": 7, "reads_in_flight": 4, **self.changes}

    def agents(self) -> list[int]:
        """The processes that have this fabric: agents of jobs."""
        word, found = f"FARMEM_TEST_FABRIC={self.fabric.path}".encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and word in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found


@cache
def fake_verbs() -> Path:
    """What the agent loads instead of libibverbs."""
    return build_native("fake_verbs") / "libfake_verbs.so"


@contextlib.contextmanager
def fake_rdma(
    monkeypatch: Any, size_bytes: int = 256 << 20, wrong: int = WELL
) -> Iterator[FakeRdmaServe]:
    """A server, and the environment by which jobs take the fake verbs."""
    with tempfile.TemporaryDirectory(prefix="farmem-fabric-", dir="/dev/shm") as folder:
        fabric = Fabric(Path(folder) / "fabric", size_bytes)
        fabric["wrong"] = wrong
        monkeypatch.setenv("FARMEM_TEST_VERBS", f"{fake_verbs()},{os.fspath(fabric.path)}")
        server = FakeRdmaServe(fabric, size_bytes)
        try:
            yield server
        finally:
            server.close()
