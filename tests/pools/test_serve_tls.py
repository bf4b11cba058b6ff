"""TLS: who has no certificate of our authority can neither lease nor read, and is told so.

The certificates are made with the very commands of docs/pools.md; the client of the data is
libnbd, whose TLS is gnutls as nbdkit's is, and the self-test's, which is openssl.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farmem.pool.tls import Tls, client_context
from tests.harness import FARMEM
from tests.pools.certificates import copy_with, make_certificates, revoke
from tests.pools.serving import LIMIT_S, MIB, UNIX, Data, Server, need, refuses, serving

pytestmark = pytest.mark.pools


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Certificates of two authorities, in folders of their own: ours, and a stranger's."""
    with tempfile.TemporaryDirectory(prefix="farmem-tls-") as name:
        for who in ("ours", "strangers"):
            make_certificates(Path(name) / who)
        yield Path(name)


def tls_options(folder: Path, mode: str = "require") -> tuple[str, ...]:
    return ("--tls", mode, "--tls-certificates", str(folder / "ours"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(*tls_options(folder), "--quota", "alice=32M") as found:
        yield found


def ask(
    server: Server, context: ssl.SSLContext | None, method: str, path: str, body: object = None
) -> tuple[int, Any]:
    """A request over TLS, or with no context over plain TCP."""
    if context is None:
        return server.ask(method, path, body)
    place = ("127.0.0.1", server.port)
    connection = http.client.HTTPSConnection(*place, timeout=LIMIT_S, context=context)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body).encode() if body else None)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def context_of(folder: Path, certificate: str = "ours", trusts: str = "ours") -> ssl.SSLContext:
    """A client's, with a certificate of one authority (or none) and trust in one."""
    context = ssl.create_default_context(cafile=str(folder / trusts / "ca-cert.pem"))
    if certificate:
        place = folder / certificate
        context.load_cert_chain(place / "client-cert.pem", place / "client-key.pem")
    return context


def test_a_certificate_is_a_tenant(server: Server, folder: Path) -> None:
    context = context_of(folder)
    status, lease = ask(server, context, "POST", "/v1/leases", {"bytes": 8 * MIB})
    assert status == 201 and lease["nbd"]["tls"] is True
    server.tokens.add(lease["token"])
    asked = {"bytes": 8 * MIB, "tenant": "bob"}
    status, found = ask(server, context, "POST", "/v1/leases", asked)
    assert status == 403 and "'alice'" in found["error"] and "'bob'" in found["error"]
    asked = {"bytes": 32 * MIB, "tenant": "alice"}
    status, found = ask(server, context, "POST", "/v1/leases", asked)
    assert status == 403 and "24.0 MiB more" in found["error"]
    with Data(lease, client_context(Tls("require", str(folder / "ours")))) as data:
        data.write(1, b"right")
        assert data.read(0, 7) == b"\0right\0"


@pytest.mark.parametrize("certificate", ["", "strangers"])
def test_without_a_certificate_of_ours_nobody_leases(
    server: Server, folder: Path, certificate: str
) -> None:
    before = server_leases(server, folder)
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(server, context_of(folder, certificate), "POST", "/v1/leases", {"bytes": MIB})
    assert server_leases(server, folder) == before


def server_leases(server: Server, folder: Path) -> int:
    return int(ask(server, context_of(folder), "GET", "/v1/server")[1]["leases"])


def test_the_server_can_be_told_from_another(server: Server, folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(server, context_of(folder, trusts="strangers"), "GET", "/healthz")


def test_plain_text_is_refused_and_told_why(server: Server) -> None:
    for method, path in (("GET", "/healthz"), ("GET", "/metrics"), ("POST", "/v1/leases")):
        status, found = server.ask(method, path, {"bytes": MIB} if method == "POST" else None)
        assert status == 403 and "TLS" in found["error"]


def test_unix_sockets_go_on_as_ever(server: Server) -> None:
    lease = server.lease(2 * MIB, UNIX)
    assert lease["nbd"]["tls"] is False
    with Data(lease) as data:
        data.write(0, b"x")
        assert data.read(0, 2) == b"x\0"


def nbdinfo(uri: str) -> int:
    need("nbdinfo")
    command = ["nbdinfo", uri]
    return subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False).returncode


def test_data_needs_a_certificate_too(server: Server, folder: Path) -> None:
    """Even for whoever has come by a token."""
    lease = ask(server, context_of(folder), "POST", "/v1/leases", {"bytes": 2 * MIB})[1]
    server.tokens.add(lease["token"])
    bare = folder / "bare"
    bare.mkdir(exist_ok=True)
    shutil.copy(folder / "ours" / "ca-cert.pem", bare)
    place = f"127.0.0.1:{lease['nbd']['port']}/{lease['token']}"
    assert nbdinfo(f"nbds://{place}?tls-certificates={folder / 'ours'}") == 0
    assert nbdinfo(f"nbds://{place}?tls-certificates={folder / 'strangers'}") != 0
    assert nbdinfo(f"nbds://{place}?tls-certificates={bare}") != 0
    assert nbdinfo(f"nbd://{place}") != 0
    with pytest.raises(Exception, match="refused"):
        Data(lease)


def test_rubbish_and_silence(server: Server, folder: Path) -> None:
    """A handshake that is none costs its sender alone."""
    with contextlib.ExitStack() as stack:
        for data in (b"\x16", b"\x16\x03\x01\xff\xff" + b"x" * 99999, b"\0", b""):
            place = ("127.0.0.1", server.port)
            sock = stack.enter_context(socket.create_connection(place, LIMIT_S))
            with contextlib.suppress(OSError):
                sock.sendall(data)
        assert ask(server, context_of(folder), "GET", "/healthz") == (200, {"status": "ok"})


def test_on_serves_both(folder: Path) -> None:
    with serving(*tls_options(folder, "on"), listens=["127.0.0.1:0"]) as server:
        plain = server.lease(2 * MIB)
        assert plain["nbd"]["tls"] is False
        with Data(plain) as data:
            data.write(0, b"plain")
            assert data.read(0, 5) == b"plain"
        status, lease = ask(server, context_of(folder), "POST", "/v1/leases", {"bytes": 2 * MIB})
        assert status == 201 and lease["nbd"]["tls"] is True
        with Data(lease, client_context(Tls("on", str(folder / "ours")))) as data:
            assert data.read(0, 5) == bytes(5)


def test_a_revoked_certificate_is_refused(folder: Path) -> None:
    """With ca-crl.pem, by both planes."""
    place = copy_with(folder / "ours", "revoking")
    revoke(place, "client")
    words = ("--tls", "require", "--tls-certificates", str(place))
    with serving(*words) as server:
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(server, context_of(folder), "GET", "/healthz")
        lease = server.lease(2 * MIB, UNIX)
        port = re.search(r"data on port (\d+)", server.log)
        assert port
        uri = f"nbds://127.0.0.1:{port[1]}/{lease['token']}?tls-certificates={place}"
        assert nbdinfo(uri) != 0


def test_the_self_test_uses_tls(folder: Path) -> None:
    command = [str(FARMEM), "serve", "--self-test", *tls_options(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all is well"


def test_certificates_that_are_no_use(folder: Path) -> None:
    """What was wrong is said before anything is lent."""
    base = ("--capacity", "8M", "--listen", "127.0.0.1:0")
    assert "needs certificates" in refuses(*base, "--tls=require")
    assert "say --tls=require" in refuses(*base, "--tls-certificates", str(folder / "ours"))
    said = refuses(*base, "--tls=require", "--tls-certificates", "/nosuch")
    assert "/nosuch/ca-cert.pem" in said and "docs/pools.md" in said
    mixed = copy_with(folder / "ours", "mixed", folder / "strangers" / "server-key.pem")
    said = refuses(*base, "--tls=require", "--tls-certificates", str(mixed))
    assert "can't be used" in said
    (mixed / "server-cert.pem").write_text("rubbish")
    assert "can't be used" in refuses(*base, "--tls=on", "--tls-certificates", str(mixed))
