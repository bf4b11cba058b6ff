"""`farmem serve`s with RDMA that are none: control channels in Python, and memory in a file, which
the fake verbs (native/tests/fake_verbs.c) read and write; each lease is a part with its own key.

The agent of the job loads the fake verbs instead of libibverbs.  What they do is counted in the
file's head (native/tests/fake_fabric.h), and what is to go wrong is said there.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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
        self._made = itertools.count()

    def __getitem__(self, word: str) -> int:
        found: int = struct.unpack_from("<Q", self._map, WORDS.index(word) * 8)[0]
        return found

    def __setitem__(self, word: str, value: int) -> None:
        struct.pack_into("<Q", self._map, WORDS.index(word) * 8, value)

    def number(self) -> int:
        """For a half that is made now."""
        return next(self._made)

    def key(self, start: int) -> int:
        """Of the lease that begins there."""
        return (self["rkey"] + (start >> 21)) & 0xFFFFFFFF

    def connect(self, place: int, *half: int) -> None:
        """A half of a queue pair: its number and PSN, and the peer's; the lease; it is silent."""
        at = HALVES_AT + place * HALF_BYTES
        struct.pack_into("<QQQQQQQQ", self._map, at, 0, *half)
        struct.pack_into("<Q", self._map, at, 1)

    def disconnect(self, place: int) -> None:
        struct.pack_into("<Q", self._map, HALVES_AT + place * HALF_BYTES, 0)

    def silence(self, place: int, on: bool) -> None:
        struct.pack_into("<Q", self._map, HALVES_AT + place * HALF_BYTES + 56, on)


class Part(NamedTuple):
    """Of the fabric's memory."""

    start: int
    size_bytes: int


class FakeRdmaServe(FakeServe):
    """Leases with queue pairs, in a part of the fabric's memory."""

    def __init__(self, fabric: Fabric, part: Part) -> None:
        super().__init__({}, part.size_bytes)
        self.fabric = fabric
        self.part = part
        self.url = self.url.replace("tcp:", "rdma:")
        self.name = self.url.removeprefix("rdma://")
        self.has_rdma = True
        self.capacity_bytes = part.size_bytes
        self.parts: dict[str, Part] = {}  # by lease
        self.leased = 0
        self.queue_pairs: dict[str, tuple[str, int]] = {}  # by name: lease, place
        self.made = 0
        self.numbers: list[int] = []  # secrets: qpn and psn of all of them
        self.changes: dict[str, Any] = {}  # of what the next answers say
        self.refusal: tuple[int, dict[str, str]] | None = None
        self._silent = False

    def _lease(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, given = super()._lease(body)
        if status != 201:
            return status, given
        self.parts[given["lease"]] = self._room(body["bytes"])
        self.leased += 1
        self._count()
        return status, {**given, "rdma": {}} if self.has_rdma else given

    def _room(self, size_bytes: int) -> Part:
        """The first place where nothing else is."""
        taken = sorted(self.parts.values())
        starts = [self.part.start, *(part.start + part.size_bytes for part in taken)]
        ends = [*(part.start for part in taken), self.part.start + self.part.size_bytes]
        for start, end in zip(starts, ends, strict=True):
            if end - start >= size_bytes:
                return Part(start, size_bytes)
        raise AssertionError("it is in pieces")

    def _count(self) -> None:
        leased = sum(part.size_bytes for part in self.parts.values())
        self.free_bytes = self.part.size_bytes - leased

    def _of_lease(self, method: str, lease: str, token: str) -> tuple[int, dict[str, Any]]:
        path, body = self.asked[-1][1:]
        parts = path.split("/")
        if len(parts) < 5 or parts[4] != "queue-pairs":
            answer = super()._of_lease(method, lease, token)
            if method == "DELETE" and answer[0] == 204:
                self.end_queue_pairs(lease)
                del self.parts[lease]
                self._count()
            return answer
        status, refused = super()._of_lease("POST", lease, token)
        self.renewals -= status == 200
        if status != 200:
            return status, refused
        if method == "DELETE":
            if self.queue_pairs.get(parts[5], ("", 0))[0] != lease:
                return 404, {"error": "there is no such queue pair", "hint": ""}
            self.fabric.disconnect(self.queue_pairs.pop(parts[5])[1])
            return 204, {}
        return self.refusal or self._queue_pair({**body, "lease": lease})

    def end_queue_pairs(self, lease: str = "") -> None:
        """All of them, or one lease's."""
        for name, (of, place) in list(self.queue_pairs.items()):
            if lease in ("", of):
                self.fabric.disconnect(place)
                del self.queue_pairs[name]

    def silence(self, on: bool = True) -> None:
        """Its device answers nothing; other servers' do."""
        self._silent = on
        for _, place in self.queue_pairs.values():
            self.fabric.silence(place, on)

    def stored_bytes(self) -> int:
        """About how much of its memory was ever written to."""
        begin, found = MEMORY_AT + self.part.start, 0
        at, end = begin, begin + self.part.size_bytes
        with self.fabric.path.open("rb") as file, contextlib.suppress(OSError):  # no more data
            while (data := os.lseek(file.fileno(), at, os.SEEK_DATA)) < end:
                at = os.lseek(file.fileno(), data, os.SEEK_HOLE)
                found += min(at, end) - data
        return found

    def _queue_pair(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert asked["gid"] == "::ffff:10.0.0.1" and asked["link"] == "ethernet"
        number, name = self.fabric.number(), secrets.token_hex(8)
        self.made += 1
        qpn, psn = 0x900000 + number, secrets.randbits(24)
        start, size_bytes = self.parts[asked["lease"]]
        half = (qpn, psn, asked["qpn"], asked["psn"], start, size_bytes, self._silent)
        self.fabric.connect(number % HALVES, *half)
        self.queue_pairs[name] = (asked["lease"], number % HALVES)
        self.numbers += [qpn, psn, asked["qpn"], asked["psn"]]
        about = {"queue_pair": name, "qpn": qpn, "psn": psn, "gid": GID, "lid": 0, "mtu": 1024}
        memory = {"rkey": self.fabric.key(start), "address": ADDRESS + start, "bytes": size_bytes}
        return 201, {**about, **memory, "retry_count": 7, "reads_in_flight": 4, **self.changes}

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
def fake_rdmas(
    monkeypatch: Any, servers: int, size_bytes: int = 256 << 20, wrong: int = WELL
) -> Iterator[list[FakeRdmaServe]]:
    """Servers that share a fabric, and the environment by which jobs take the fake verbs."""
    with (
        tempfile.TemporaryDirectory(prefix="farmem-fabric-", dir="/dev/shm") as folder,
        contextlib.ExitStack() as stack,
    ):
        fabric = Fabric(Path(folder) / "fabric", servers * size_bytes)
        fabric["wrong"] = wrong
        monkeypatch.setenv("FARMEM_TEST_VERBS", f"{fake_verbs()},{os.fspath(fabric.path)}")
        found = []
        for number in range(servers):
            found.append(FakeRdmaServe(fabric, Part(number * size_bytes, size_bytes)))
            stack.callback(found[-1].close)
        yield found


@contextlib.contextmanager
def fake_rdma(
    monkeypatch: Any, size_bytes: int = 256 << 20, wrong: int = WELL
) -> Iterator[FakeRdmaServe]:
    """One server."""
    with fake_rdmas(monkeypatch, 1, size_bytes, wrong) as [server]:
        yield server
