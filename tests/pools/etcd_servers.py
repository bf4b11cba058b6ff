"""Real etcd servers for the tests: one or a cluster, with TLS or without."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from farmem.registry import Registry, parse_registry
from tests.pools.nbd_servers import free_port
from tests.pools.serving import need, until

LIMIT_S = 60


class Member:
    """An etcd."""

    def __init__(self, folder: Path, name: str, tls: Path | None = None) -> None:
        self.name = name
        self._tls = tls
        self.folder = folder
        self.port, self.peer_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def peer(self) -> str:
        return f"{self.name}=http://127.0.0.1:{self.peer_port}"

    def start(self, cluster: list[Member]) -> None:
        client = f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"
        peer = f"http://127.0.0.1:{self.peer_port}"
        command = ["etcd", "--name", self.name, "--data-dir", str(self.folder / self.name)]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", ",".join(member.peer for member in cluster)]
        if self._tls:
            command += ["--client-cert-auth", "--trusted-ca-file", str(self._tls / "ca-cert.pem")]
            command += ["--cert-file", str(self._tls / "server-cert.pem")]
            command += ["--key-file", str(self._tls / "server-key.pem")]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(LIMIT_S)
            self.process = None

    def said(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    def watchers(self) -> int:
        """How many wait for a change."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=LIMIT_S) as answer:
            text = answer.read().decode()
        found = re.search(r"^etcd_debugging_mvcc_watcher_total (\d+)$", text, re.MULTILINE)
        assert found, text
        return int(found[1])

    def put(self, key: str, value: str) -> None:
        """By somebody else."""
        words = {"key": key, "value": value}
        body = {name: base64.b64encode(word.encode()).decode() for name, word in words.items()}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v3/kv/put", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            assert answer.status == 200


def soon() -> float:
    return time.monotonic() + 5


def registry_of(members: list[Member], prefix: str = "") -> Registry:
    return parse_registry(url_of(members, prefix))


def url_of(members: list[Member], prefix: str = "") -> str:
    places = ",".join(f"127.0.0.1:{member.port}" for member in members)
    return f"registry+etcd://{places}{prefix}"


def has_begun(members: list[Member]) -> bool:
    """They have found each other, and listen."""
    for member in members:
        assert member.process is not None and member.process.poll() is None, member.said()
    return all("ready to serve client requests" in member.said() for member in members)


@contextlib.contextmanager
def etcd(size: int = 1, tls: Path | None = None) -> Iterator[list[Member]]:
    """A cluster of so many; with a folder of certificates clients need TLS and one of their own."""
    need("etcd")
    with tempfile.TemporaryDirectory(prefix="farmem-etcd-") as name:
        members = [Member(Path(name), f"member{number}", tls) for number in range(size)]
        try:
            for member in members:
                member.start(members)
            until(lambda: has_begun(members), "etcd", LIMIT_S)
            yield members
        finally:
            for member in members:
                member.stop()
