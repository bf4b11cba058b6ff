"""TLS that is not right is refused before the program starts, within five seconds, in words that
name what is wrong: who is not there, not believed, or does not believe us.

The certificates that are wrong are wrong in one thing each.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import run_farmem
from tests.pools.certificates import copy_with, expire, make_certificates, revoke
from tests.pools.nbd_servers import nbd_server
from tests.pools.serving import serving
from tests.pools.tls_run import tls_nbdkit, tls_words

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
KINDS = ("tcp", "nbds")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Certificates: ours, a stranger's authority, a server of another name, some that expired."""
    with tempfile.TemporaryDirectory(prefix="farmem-tls-") as name:
        place = Path(name)
        ours = make_certificates(place / "ours")
        make_certificates(place / "strangers")
        other = make_certificates(place / "other", "DNS:pool7,IP:127.0.0.2")
        copy_with(ours, "no-key", other / "client-key.pem")
        expire(copy_with(ours, "expired"), "server")
        expire(copy_with(ours, "old-client"), "client")
        revoke(copy_with(ours, "revoking"), "server")
        yield place


def refused(url: str, *words: str, says: tuple[str, ...]) -> str:
    begin = time.monotonic()
    result = run_farmem(["true"], local="32M", options=("--pool", url, *words), check=False)
    assert time.monotonic() - begin < 20, "a limit to end a hang; the promise is five seconds"
    assert result.returncode == 125, result.describe()
    text = result.stderr.decode()
    assert all(word in text for word in says), (says, text)
    assert "Traceback" not in text and len(text.splitlines()) == 2, text
    return text


def refused_by(
    kind: str, certificates: Path, tmp_path: Path, *words: str, says: tuple[str, ...]
) -> None:
    """By a real server that has these certificates and wants TLS."""
    if kind == "tcp":
        with serving(*tls_words(certificates), listens=["127.0.0.1:0"]) as server:
            url = f"tcp://127.0.0.1:{server.port}"
            refused(url, *words, says=(f"127.0.0.1:{server.port}", *says))
            assert "lease" not in server.log.partition("listening")[2], server.log
    else:
        with tls_nbdkit(tmp_path, certificates) as other:
            refused(other.url, *words, says=(f"127.0.0.1:{other.port}", *says))


# ---- the server's certificate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("servers", "ours", "says"),
    [
        ("expired", "ours", "has expired"),
        ("strangers", "ours", "is not of the authority in"),
        ("other", "other", "is not for the name '127.0.0.1'"),
        ("ours", "revoking", "certificate revoked"),
    ],
)
def test_a_server_that_is_not_believed(
    kind: str, servers: str, ours: str, says: str, folder: Path, tmp_path: Path
) -> None:
    words = tls_words(folder / ours)
    refused_by(kind, folder / servers, tmp_path, *words, says=("the certificate of", says))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ours", ["strangers", "old-client"])
def test_a_server_that_does_not_believe_us(
    kind: str, ours: str, folder: Path, tmp_path: Path
) -> None:
    """The server's authority is believed by us, so it is the client's certificate that is wrong."""
    place = copy_with(folder / ours, f"{kind}-{ours}", folder / "ours" / "ca-cert.pem")
    says = ("take the certificate in", str(place))
    refused_by(kind, folder / "ours", tmp_path, *tls_words(place), says=says)


# ---- no TLS, on either side


def test_a_server_that_wants_tls(folder: Path, tmp_path: Path) -> None:
    says = ("TLS alone", "--tls=require --tls-certificates FOLDER")
    with serving(*tls_words(folder / "ours"), listens=["127.0.0.1:0"]) as server:
        refused(f"tcp://127.0.0.1:{server.port}", says=says)
    with tls_nbdkit(tmp_path, folder / "ours") as other:
        url = f"nbd://127.0.0.1:{other.port}/"
        refused(url, says=("wants TLS", "--tls=require --tls-certificates FOLDER"))


def test_a_server_that_offers_none(folder: Path) -> None:
    words = tls_words(folder / "ours")
    says = ("does not speak TLS", "--tls=require", "--tls=off")
    with serving(listens=["127.0.0.1:0"]) as server:
        refused(f"tcp://127.0.0.1:{server.port}", *words, says=says)
    with nbd_server() as other:
        says = ("offers no TLS", "--tls=require", "--tls=off")
        refused(f"nbds://127.0.0.1:{other.port}/", *words, says=says)
        refused(f"nbd://127.0.0.1:{other.port}/", *words, says=says)


@pytest.mark.parametrize("kind", KINDS)
def test_somebody_is_there_and_says_nothing(kind: str, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        says = (f"127.0.0.1:{port}", "does not answer")
        refused(f"{kind}://127.0.0.1:{port}", *tls_words(folder / "ours"), says=says)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [b"SSH-2.0-x\r\n", bytes(64)])
def test_somebody_else_is_there(kind: str, words: bytes, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.sendall(words)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1000)

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        says = (f"127.0.0.1:{port}",)
        refused(f"{kind}://127.0.0.1:{port}", *tls_words(folder / "ours"), says=says)


def test_nobody_is_there(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for kind in KINDS:
        says = (f"127.0.0.1:{port} can't be reached", "Connection refused")
        refused(f"{kind}://127.0.0.1:{port}", *tls_words(folder / "ours"), says=says)


# ---- nothing said, or what can't be used


@pytest.mark.parametrize("kind", ["tcp", "nbd"])
def test_another_host_needs_a_word(kind: str) -> None:
    """Said before anything goes there: the address is nobody's."""
    says = ("another host", "--tls=require --tls-certificates FOLDER", "--tls=off")
    refused(f"{kind}://192.0.2.1:7717", says=says)


def test_certificates_must_be_named() -> None:
    says = ("needs certificates", "--tls-certificates FOLDER", "docs/pools.md")
    refused("tcp://127.0.0.1:7717", "--tls=require", says=says)
    refused("tcp://127.0.0.1:7717", "--tls=on", says=says)
    refused("nbds://127.0.0.1:7717/", says=says)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ca-cert.pem", "client-cert.pem", "client-key.pem"])
def test_a_file_that_is_not_there(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "some"
    shutil.copytree(folder / "ours", place)
    (place / name).unlink()
    says = (f"there is no {place}/{name} that can be read", "docs/pools.md")
    refused(f"{kind}://127.0.0.1:7717", *tls_words(place), says=says)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["rubbish", "another key", "pass phrase"])
def test_certificates_that_are_no_use(kind: str, what: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "some"
    shutil.copytree(folder / ("no-key" if what == "another key" else "ours"), place)
    if what == "rubbish":
        (place / "client-cert.pem").write_text("rubbish")
    if what == "pass phrase":
        key = str(place / "client-key.pem")
        words = ["-in", str(folder / "ours" / "client-key.pem"), "-passout", "pass:word"]
        command = ["openssl", "pkey", *words, "-aes128", "-out", key]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    with nbd_server() as server:
        says = (f"the certificates in {place} can't be used",)
        refused(f"{kind}://127.0.0.1:{server.port}", *tls_words(place), says=says)


def test_what_is_for_other_hosts_does_not_hold_here(tmp_path: Path) -> None:
    """Pools of this host don't need certificates, whatever a configuration file says of others."""
    options = ("--tls=require", "--pool", "mem:64M")
    assert run_farmem(["true"], local="32M", options=options).returncode == 0
    with nbd_server(over="unix") as server:
        options = ("--tls=require", *server.options)
        assert run_farmem(["true"], local="32M", options=options).returncode == 0
