"""A job of a fake engine (fake_engine.py) that runs until it is told to end: something for
`farmem stat` and `farmem set` to look at.  Its figures are what a script says."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FARMEM = Path(sys.executable).with_name("farmem")
LIMIT_SECONDS = 30

TWO_PROCESSES = """
parent = Engine().hello()
go, gone = os.pipe()
if os.fork() == 0:
    os.close(gone)
    child = Engine().hello()
    child.proc.local_bytes, child.proc.counters.faults_fetch = 7 << 20, 30
    child.proc.counters.pages_fetched, child.proc.counters.stall_ns = 200, 5
    os.close(1); os.read(go, 1); os._exit(0)
parent.proc.state = lib.FM_PROC_ADOPTED
parent.proc.local_bytes, parent.proc.remote_bytes = 50 << 20, 9 << 20
c = parent.proc.counters
c.faults_fresh, c.faults_rescue, c.pages_fetched, c.pages_evicted = 3, 4, 100, 50
c.managed_bytes, c.engine_bytes, c.peak_local_bytes = 60 << 20, 1 << 20, 55 << 20
os.close(1); sys.stdin.read()
"""
ONE_PROCESS = "e = Engine().hello(); os.close(1); sys.stdin.read()\n"


class Started:
    """A job of a fake engine that runs until its stdin ends."""

    def __init__(self, folder: Path, script: str, arguments: tuple[str, ...]) -> None:
        self.stats_path = folder / "stats.json"
        options = json.dumps({"stats_path": str(self.stats_path)})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.fake_engine", options, script, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.pid = self.process.pid
        self.name = self.token = ""

    def wait_ready(self) -> Started:
        """Wait until the script has closed its stdout."""
        assert self.process.stdout is not None
        assert self.process.stdout.read() == b""
        words = Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        [word] = [word for word in words if word.startswith(b"FARMEM_JOB=")]
        self.name, self.token = word.partition(b"=")[2].decode().split(":")
        return self

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Waits for a place among those that wait, as an engine does; but not for ever.
        seconds = struct.pack("ll", LIMIT_SECONDS, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        sock.connect(f"\0{self.name}")
        sock.settimeout(LIMIT_SECONDS)
        return sock

    def finish(self) -> dict[str, Any]:
        """End the job; its statistics."""
        _, err = self.process.communicate(timeout=LIMIT_SECONDS)
        assert self.process.returncode == 0, err.decode()
        self.said = err.decode()
        wait_until(self.stats_path.exists)
        stats: dict[str, Any] = json.loads(self.stats_path.read_text())
        return stats


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


Start = Callable[..., Started]


def farmem(*words: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, str(FARMEM), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
