"""Certificates for the tests, made with the very commands of docs/pools.md."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.harness import ROOT
from tests.pools.serving import need

LIMIT_S = 60
NAMES = "DNS:pool7,IP:127.0.0.1"
FOR_SERVERS = "extendedKeyUsage=serverAuth"


def _run(command: list[str], place: Path) -> None:
    subprocess.run(command, cwd=place, capture_output=True, check=True, timeout=LIMIT_S)


def make_certificates(place: Path, names: str = NAMES, *, for_etcd: bool = False) -> Path:
    """An authority of its own, a server of these names, and the client alice.  etcd shows its
    certificate as a client, too."""
    need("openssl")
    found = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / "pools.md").read_text(), re.DOTALL)
    assert found and NAMES in found[1]
    place.mkdir()
    commands = found[1].replace(NAMES, names)
    if for_etcd:
        assert FOR_SERVERS in commands
        commands = commands.replace(FOR_SERVERS, f"{FOR_SERVERS},clientAuth")
    _run(["sh", "-e", "-c", commands], place)
    return place


def copy_with(place: Path, to: str, *files: Path) -> Path:
    """A copy of a folder beside it, with some files of others'."""
    target = place.with_name(to)
    shutil.copytree(place, target)
    for file in files:
        shutil.copy(file, target)
    return target


def expire(place: Path, name: str) -> None:
    """Make NAME-cert.pem one that has expired, of the same key and authority."""
    key, certificate = f"{name}-key.pem", f"{name}-cert.pem"
    _run(
        [
            "openssl", "x509", "-in", certificate, "-signkey", key, "-x509toreq",
            "-copy_extensions", "copy", "-out", "request.pem",
        ],
        place,
    )  # fmt: skip
    _run(
        [
            "openssl", "x509", "-req", "-in", "request.pem", "-CA", "ca-cert.pem",
            "-CAkey", "ca-key.pem", "-days", "-1", "-copy_extensions", "copy", "-out", certificate,
        ],
        place,
    )  # fmt: skip


def revoke(place: Path, name: str) -> None:
    """Make ca-crl.pem, in which NAME-cert.pem stands."""
    (place / "index").touch()
    (place / "ca.cnf").write_text(
        "[ca]\ndefault_ca=c\n[c]\ndatabase=index\ncertificate=ca-cert.pem\n"
        "private_key=ca-key.pem\ndefault_md=sha256\ndefault_crl_days=9\n"
    )
    openssl = ["openssl", "ca", "-config", "ca.cnf"]
    for words in (["-revoke", f"{name}-cert.pem"], ["-gencrl", "-out", "ca-crl.pem"]):
        _run([*openssl, *words], place)


def agents(folder: Path) -> list[int]:
    """The processes that speak TLS with this folder's certificates."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == b"farmem-tls" and words[1] == str(folder).encode():
            found.append(int(entry.name))
    return found
