"""Redis for `make bench`: a server in the place that is measured, its clients outside.

The data are known keys with known values, written and read back over the server's socket;
redis-benchmark asks for the same keys at random.  Nothing is said to be fast that was not also
found right: every key is read at the end.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench_place import Place
from bench_report import Metric
from bench_run import STOP, Child, Failed, pause
from bench_swap import MIB, Unavailable
from bench_work import RUN_SECONDS_MAX, Workload

PROGRAMS = ("redis-server", "redis-benchmark")
VALUE_BYTES = 1000
KEYS_AT_ONCE = 500
CLIENTS = 20
START_SECONDS_MAX = 30.0
ANSWER_SECONDS_MAX = 60.0


def key_of(number: int) -> bytes:
    """As redis-benchmark writes `key:__rand_int__`."""
    return b"key:%012d" % number


def value_of(number: int) -> bytes:
    """Like no other's; its second half repeats the first, so that it packs to about half."""
    return hashlib.shake_256(b"%d" % number).hexdigest(VALUE_BYTES // 4).encode() * 2


def encode(*words: bytes) -> bytes:
    """A command in the protocol of Redis."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


class Client:
    """A connection to the server, for filling it and for reading everything back."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_SECONDS_MAX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._stream = self._socket.makefile("rb")

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> bytes | int | list[bytes | int | None] | None:
        line = self._stream.readline()
        kind, rest = line[:1], line[1:].strip()
        if kind == b"*":
            items = [self.answer() for _ in range(int(rest))]
            return [item for item in items if not isinstance(item, list)]
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self._stream.read(size + 2)[:-2]
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        raise Failed(f"redis answered {line[:200]!r}")

    def ask(self, *words: bytes) -> bytes | int | list[bytes | int | None] | None:
        self.send(encode(*words))
        return self.answer()

    def info(self, name: str) -> int:
        """A number of INFO."""
        text = self.ask(b"INFO")
        lines = text.decode().splitlines() if isinstance(text, bytes) else []
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(values[name])


def blocks(keys: int) -> Iterator[range]:
    for start in range(0, keys, KEYS_AT_ONCE):
        STOP.check()
        yield range(start, min(start + KEYS_AT_ONCE, keys))


def fill(client: Client, keys: int) -> None:
    for block in blocks(keys):
        client.send(b"".join(encode(b"SET", key_of(i), value_of(i)) for i in block))
        for _ in block:
            if client.answer() != b"OK":
                raise Failed("redis did not take a key")


def count_rewritten(client: Client, keys: int) -> int:
    """Every key has its own first value, or the one that redis-benchmark writes: how many have?

    That one is the same for all keys of a run, and of the same length.
    """
    others: set[bytes] = set()
    rewritten = 0
    for block in blocks(keys):
        got = client.ask(b"MGET", *(key_of(i) for i in block))
        assert isinstance(got, list) and len(got) == len(block)
        for number, value in zip(block, got, strict=True):
            if value == value_of(number):
                continue
            if not isinstance(value, bytes) or len(value) != VALUE_BYTES:
                raise Failed(f"redis: wrong bytes under {key_of(number).decode()}")
            others.add(value)
            rewritten += 1
    if len(others) > 1:
        raise Failed("redis: wrong bytes: keys hold values that nobody wrote")
    return rewritten


def parse_rate(text: str) -> float:
    """Requests per second, from redis-benchmark --csv (one test)."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if len(rows) != 1 or "rps" not in rows[0]:
        raise Failed(f"not a report of redis-benchmark: {text.strip()!r}")
    return float(rows[0]["rps"])


class Redis(Workload):
    """A server with more data than its budget, asked by redis-benchmark."""

    name = "redis"

    def __init__(self, mib: int) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise Unavailable(f"{' and '.join(missing)} not installed: run tools/setup.sh test")
        self._keys = mib * MIB * 8 // 10 // VALUE_BYTES
        self._requests = max(2000, self._keys // 3)
        self.title = (
            f"redis-server with {self._keys:,} keys of {VALUE_BYTES} bytes, {self._requests:,} "
            f"requests for keys at random from {CLIENTS} clients over a Unix socket"
        )
        self.metrics = (
            Metric("get", "GET", "requests/s", 1.0, more_is_better=True),
            Metric("set", "SET", "requests/s", 1.0, more_is_better=True),
        )

    def run(self, place: Place) -> dict[str, float]:
        # A short path: that of a Unix socket may have 107 bytes.
        with tempfile.TemporaryDirectory(prefix="farmem-bench-") as folder:
            path = Path(folder) / "s"
            with Child(place.wrap(self._command(path, folder))) as server:
                client = wait_ready(server, path)
                try:
                    rates = self._measure(server, client, path, place)
                except OSError as error:
                    raise Failed(f"redis: the connection broke: {error}") from error
                finally:
                    client.close()
                server.terminate()
                place.said = server.wait(RUN_SECONDS_MAX).good("redis-server").stderr
        return rates

    def _command(self, path: Path, folder: str) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(path),
            "dir": folder,
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
        }
        return ["redis-server", *(part for k, v in settings.items() for part in (f"--{k}", v))]

    def _measure(self, server: Child, client: Client, path: Path, place: Place) -> dict[str, float]:
        fill(client, self._keys)
        place.look(server.pid)
        rates = {"get": self._load("get", path)}
        place.look(server.pid)
        misses, hits = client.info("keyspace_misses"), client.info("keyspace_hits")
        if misses or hits < self._requests:
            raise Failed(f"redis: wrong answers: {misses} known keys of {hits + misses} not found")
        rates["set"] = self._load("set", path)
        place.look(server.pid)
        rewritten = count_rewritten(client, self._keys)
        if not 0 < rewritten <= self._requests:
            raise Failed(f"redis: {rewritten} keys were rewritten by {self._requests} requests")
        return rates

    def _load(self, test: str, path: Path) -> float:
        command = ["redis-benchmark", "-s", str(path), "-t", test, "--csv"]
        sizes = {"-r": self._keys, "-n": self._requests, "-d": VALUE_BYTES, "-c": CLIENTS}
        command += [word for k, v in sizes.items() for word in (k, str(v))]
        with Child(command) as child:
            return parse_rate(child.wait(RUN_SECONDS_MAX).good("redis-benchmark").stdout.decode())


def wait_ready(server: Child, path: Path) -> Client:
    """A client, once the server answers."""
    end = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < end and server.is_running():
        try:
            client = Client(path)
        except OSError:
            pause(0.01)
            continue
        if client.ask(b"PING") == b"PONG":
            return client
        client.close()
    if not server.is_running():
        server.wait(START_SECONDS_MAX).good("redis-server")
    raise Failed("redis-server does not answer")
