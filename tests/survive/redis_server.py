"""A Redis server, daemonized, on a Unix socket of its own: starting, filling, asking, stopping.

Known keys with known values are written through redis-cli and read back the same way, each byte
compared.  redis-benchmark works on other keys meanwhile, so that what it changes at random never
blurs what is verified.  Only a server that was started here is ever stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.survive.plain import MINIMUM_BYTES, SAMPLE_SECONDS, anonymous_bytes

PROGRAMS = ("redis-server", "redis-cli", "redis-benchmark", "redis-check-rdb")
KEYS = 220_000
KEYS_PER_QUESTION = 1000
START_SECONDS_MAX = 30.0
SAVE_SECONDS_MAX = 120.0
BENCHMARK_SECONDS_MAX = 180.0


@dataclass(frozen=True)
class RedisPlain:
    """The peak of the plain server's anonymous memory."""

    peak_bytes: int

    def budget_bytes(self, percent: int) -> int:
        budget = self.peak_bytes * percent // 100
        assert budget >= MINIMUM_BYTES, "raise KEYS: the budget is under farmem's minimum"
        return budget


def value_of(number: int) -> str:
    """300 characters or so, none like another's, and not all of the same length."""
    seed = (number * 2654435761 + 12345) & 0xFFFFFFFF
    return f"{seed:08x}-{number}-" * (12 + number % 5)


def need_redis() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: run tools/setup.sh test")


class Server:
    """What can be asked of a running server; `folder` holds its socket and its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "s"
        self.rdb = folder / "dump.rdb"

    def command(self) -> list[str]:
        settings = {
            "daemonize": "yes",
            "save": "",
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "dbfilename": self.rdb.name,
            "pidfile": str(self.folder / "pid"),
            "logfile": str(self.folder / "log"),
            "appendonly": "no",
        }
        return ["redis-server", *(part for k, v in settings.items() for part in (f"--{k}", v))]

    def cli(self, *words: str, stdin: bytes | None = None, timeout: float = 120) -> bytes:
        command = ["redis-cli", "-s", str(self.socket), "--raw", *words]
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr!r}\n{self.log()}"
        return done.stdout

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text()[-2000:] if path.exists() else "(no log)"

    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def wait_ready(self) -> None:
        """Until it answers PING, after loading too."""
        end = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < end:
            if self.socket.exists():
                with contextlib.suppress(AssertionError):
                    if self.cli("PING").strip() == b"PONG":
                        return
            time.sleep(0.05)
        raise AssertionError(f"redis-server does not answer\n{self.log()}")

    def info(self, section: str) -> dict[str, str]:
        lines = self.cli("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def fill(self) -> None:
        lines = "".join(f"SET user:{i} {value_of(i)}\r\n" for i in range(KEYS))
        answer = self.cli("--pipe", stdin=lines.encode())
        assert f"errors: 0, replies: {KEYS}".encode() in answer, answer[-500:]

    def verify(self) -> None:
        """Every key, in questions of a thousand; the stride makes neighbours in memory part."""
        for start in range(0, KEYS, KEYS_PER_QUESTION):
            numbers = [(start + i) * 7919 % KEYS for i in range(KEYS_PER_QUESTION)]
            question = "MGET " + " ".join(f"user:{number}" for number in numbers)
            got = self.cli(stdin=question.encode()).decode().split("\n")[: len(numbers)]
            wrong = [n for n, value in zip(numbers, got, strict=True) if value != value_of(n)]
            assert not wrong, f"{len(wrong)} wrong values, the first is of user:{wrong[0]}"

    def save_under_load(self) -> None:
        """BGSAVE while redis-benchmark changes and reads other keys."""
        command = ["redis-benchmark", "-s", str(self.socket), "-q", "-t", "set,get,lpush,incr"]
        sizes = ["-n", "40000", "-r", "20000", "-d", "200", "-c", "20"]
        load = subprocess.Popen([*command, *sizes], stdout=subprocess.DEVNULL)
        try:
            time.sleep(0.3)
            assert load.poll() is None, "the load ended before the save began: raise -n"
            self.cli("BGSAVE")
            end = time.monotonic() + SAVE_SECONDS_MAX
            while self.info("persistence")["rdb_bgsave_in_progress"] != "0":
                assert time.monotonic() < end, f"BGSAVE does not end\n{self.log()}"
                time.sleep(0.05)
            assert self.info("persistence")["rdb_last_bgsave_status"] == "ok", self.log()
            assert load.wait(BENCHMARK_SECONDS_MAX) == 0
        finally:
            load.kill()
            load.wait()

    def check_rdb(self) -> None:
        """The file is sound by Redis's own judgement, and a plain server finds every key in it."""
        done = subprocess.run(
            ["redis-check-rdb", str(self.rdb)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "RDB looks OK" in done.stdout, done.stdout
        with plain_server(self.folder) as again:
            again.verify()

    def shutdown(self) -> None:
        pid = self.pid()
        with contextlib.suppress(AssertionError):
            self.cli("SHUTDOWN", "NOSAVE")
        end = time.monotonic() + START_SECONDS_MAX
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < end, f"redis-server does not end\n{self.log()}"
            time.sleep(0.02)

    def kill(self) -> None:
        """For when a test failed: the daemon has left our session, only its pid file tells."""
        with contextlib.suppress(OSError, ValueError):
            pid = self.pid()
            if b"redis-server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def plain_server(folder: Path) -> Iterator[Server]:
    """A server without farmem; it loads the dump.rdb that lies in the folder, if one does."""
    server = Server(folder)
    subprocess.run(server.command(), check=True, capture_output=True, timeout=30)
    try:
        server.wait_ready()
        yield server
        server.shutdown()
    finally:
        server.kill()


class Watch:
    """Samples one process's anonymous memory from a thread, and keeps the highest."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes([self._pid]))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def exercise(server: Server) -> None:
    """What every server goes through, plain or under farmem."""
    server.fill()
    server.verify()
    server.save_under_load()
    server.verify()


def redis_plain(folder: Path) -> RedisPlain:
    """Redis by itself; it must pass the very tests that it is put to under farmem."""
    need_redis()
    with (
        plain_server(folder) as server,
        Watch(server.pid()) as watch,
    ):
        exercise(server)
    return RedisPlain(watch.peak_bytes)
