"""Registries with TLS, of a real `farmem serve` and of a real etcd: servers register, `farmem
pools` lists them and `farmem run` uses them; what is wrong with TLS is refused in a sentence.

The rule is that of servers: another host is spoken to with TLS, or --tls=off is said.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from farmem import registry as registries
from farmem.errors import FarmemError
from farmem.lease import Answer, Control
from farmem.registry import Entry, Registry, parse_registry
from farmem.registry import etcd as registry_etcd
from farmem.registry import http as registry_http
from farmem.tls import Tls
from tests.harness import FARMEM, assert_ok, compile_c, run_farmem
from tests.pools.certificates import copy_with, expire, make_certificates, revoke
from tests.pools.etcd_servers import etcd
from tests.pools.nbd_servers import free_port
from tests.pools.serving import refuses, serving, until
from tests.pools.tls_run import Wire, tls_nbdkit, tls_words
from tests.pools.watched import Watched

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
KINDS = ("http", "etcd")
LIMIT_S = 60
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Certificates: ours, a stranger's authority, a server of another name, some that expired."""
    with tempfile.TemporaryDirectory(prefix="farmem-tls-") as name:
        place = Path(name)
        ours = make_certificates(place / "ours", for_etcd=True)
        make_certificates(place / "strangers", for_etcd=True)
        make_certificates(place / "other", "DNS:pool7,IP:127.0.0.2", for_etcd=True)
        make_certificates(place / "servers-alone")
        expire(copy_with(ours, "expired"), "server")
        expire(copy_with(ours, "old-client"), "client")
        revoke(copy_with(ours, "revoking"), "server")
        (copy_with(ours, "no-client") / "client-cert.pem").unlink()
        yield place


@contextlib.contextmanager
def keeping(kind: str, certificates: Path | None) -> Iterator[int]:
    """A registry of its own, and its port; without certificates it has no TLS."""
    if kind == "http":
        words = tls_words(certificates) if certificates else ()
        with serving("--registry", *words, capacity="8M", listens=["127.0.0.1:0"]) as keeper:
            yield keeper.port
    else:
        with etcd(tls=certificates) as [member]:
            yield member.port


def url_of(kind: str, port: int, *, tls: bool = True, behind: str = "") -> str:
    return f"registry+{kind}{'s' if tls else ''}://127.0.0.1:{port}{behind}"


def asked(url: str, certificates: Path) -> Registry:
    """As a job asks."""
    registry = parse_registry(url)
    registry.tls = Tls("require", str(certificates))
    return registry


def soon() -> float:
    return time.monotonic() + 5


def urls(url: str, certificates: Path) -> list[str]:
    return [entry.url for entry in asked(url, certificates).entries(soon())]


def pools(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(FARMEM), "pools", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd=cwd
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def refused(url: str, *words: str, says: Sequence[str]) -> None:
    """To whoever lists and to whoever uses it: one sentence, and what to type."""
    listed = pools("--registry", url, *words)
    assert not listed.stdout
    used = run_farmem(["true"], local="32M", options=("--pool", url, *words), check=False)
    for status, text in (
        (listed.returncode, listed.stderr),
        (used.returncode, used.stderr.decode()),
    ):
        assert status == 125 and len(text.splitlines()) == 2, text
        assert all(word in text for word in says), (says, text)
        assert "Traceback" not in text, text


# ---- all is well


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_url", [True, False], ids=["by-url", "as-said"])
def test_servers_register_are_listed_and_used(kind: str, by_url: bool, folder: Path) -> None:
    """Nothing of it can be read on the way.  The folder is a relative one: the supervisor, which
    leases more, has another current folder.  (What keeps the registry lends too little.)"""
    words = tls_words(folder / "ours")
    with keeping(kind, folder / "ours") as port:
        wire = Wire(port)
        url = url_of(kind, wire.port, tls=by_url)
        with (
            serving("--register", url, *words, capacity="128M") as first,
            serving("--register", url, *words, capacity="128M") as second,
        ):
            both = {f"tcp://127.0.0.1:{server.port}" for server in (first, second)}
            until(lambda: both <= set(urls(url, folder / "ours")), "both", LIMIT_S)
            relative = ("--tls-certificates", "ours")
            done = pools("--json", "--registry", url, *relative, cwd=folder)
            assert done.returncode == 0, done.stderr
            found = {server["url"]: server for server in json.loads(done.stdout)["servers"]}
            assert both <= set(found)
            assert all(found[server]["free_bytes"] == 128 * MIB for server in both)
            result = run_farmem(
                [compile_c("verify"), "1", "160", "1"],
                local="32M",
                options=("--pool", url, *relative),
                cwd=folder,
            )
            # `farmem run` has leased, and then the supervisor.
            asking = re.findall(r"MiB to 'alice' for '\S+ (\d+)'", first.log + second.log)
            assert len(set(asking)) == 2, asking
            first.end()
            gone = f"tcp://127.0.0.1:{first.port}"
            assert gone not in urls(url, folder / "ours")
        wire.close()
    assert_ok(result)
    assert wire.bytes_seen() and b"tcp://" not in wire.bytes_seen()


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_told_by_tls_too(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the tests without: nobody comes in time who asks again."""
    waits = threading.Event()
    follow, call = Control.follow, Control.call

    def followed(self: Control, *words: Any) -> Iterator[dict[str, Any]]:
        waits.set()
        return follow(self, *words)

    def called(self: Control, method: str, path: str, *words: Any) -> Answer:
        if "wait_ns" in path:
            waits.set()
        return call(self, method, path, *words)

    monkeypatch.setattr(Control, "follow", followed)
    monkeypatch.setattr(Control, "call", called)
    for module in (registries, registry_http, registry_etcd):
        monkeypatch.setattr(module, "POLL_SECONDS", 1e6)
    with keeping(kind, folder / "ours") as port:
        registry = asked(url_of(kind, port), folder / "ours")
        known = []
        if kind == "http":
            known = until(lambda: registry.entries(soon()), "its own entry")
        watched = Watched(asked(url_of(kind, port), folder / "ours"), known)
        assert waits.wait(LIMIT_S)
        registry.register(Entry("ab", "tcp://rack7:1", "rack7", "ab"), 30, soon())
        assert "tcp://rack7:1" in watched.urls()


def test_endpoints_that_are_no_use_are_passed_by(folder: Path) -> None:
    """One that is dead, one without TLS, one that is somebody else's."""
    strangers = serving(*tls_words(folder / "strangers"), listens=["127.0.0.1:0"])
    with etcd(tls=folder / "ours") as [member], serving() as plain, strangers as stranger:
        places = (free_port(), plain.port, stranger.port, member.port)
        url = "registry+etcds://" + ",".join(f"127.0.0.1:{port}" for port in places)
        registry = asked(url, folder / "ours")
        registry.register(Entry("ab", "tcp://rack7:1", "rack7", "ab"), 30, soon())
        assert [entry.url for entry in registry.entries(soon())] == ["tcp://rack7:1"]
        assert urls(url, folder / "ours") == ["tcp://rack7:1"]
        with pytest.raises(FarmemError) as caught:
            urls(url.rpartition(",")[0], folder / "ours")
    for word in ("Connection refused", "does not speak TLS", "is not of the authority"):
        assert word in caught.value.what, caught.value.what


@pytest.mark.parametrize("kind", KINDS)
def test_one_registry_can_have_certificates_of_its_own(kind: str, folder: Path) -> None:
    """And servers others: here they are of another authority."""
    with keeping(kind, folder / "strangers") as port:
        url = url_of(kind, port, tls=False, behind=f"?certificates={folder / 'strangers'}")
        with serving("--register", url, *tls_words(folder / "ours")) as server:
            its = f"tcp://127.0.0.1:{server.port}"
            until(lambda: its in urls(url, folder / "ours"), "its entry", LIMIT_S)
            done = pools("--json", "--registry", url, *tls_words(folder / "ours"))
            found = {server["url"]: server for server in json.loads(done.stdout)["servers"]}
            assert found[its]["error"] is None
            assert all("authority" in found[other]["error"] for other in found if other != its)


@pytest.mark.parametrize("kind", KINDS)
def test_one_registry_can_be_without_tls(kind: str, folder: Path) -> None:
    with keeping(kind, None) as port:
        url = url_of(kind, port, tls=False, behind="?tls=off")
        with serving("--register", url, *tls_words(folder / "ours")) as server:
            its = f"tcp://127.0.0.1:{server.port}"
            until(lambda: its in urls(url, folder / "ours"), "its entry", LIMIT_S)


@pytest.mark.parametrize("kind", KINDS)
def test_where_tls_may_be_it_is_tried(kind: str, folder: Path) -> None:
    """--tls=on: with it where it is offered, without it where it is not."""
    for certificates in (folder / "ours", None):
        with keeping(kind, certificates) as port:
            registry = parse_registry(url_of(kind, port, tls=False))
            registry.tls = Tls("on", str(folder / "ours"))
            registry.entries(soon())


# ---- what is refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("servers", "cases"),
    [
        ("ours", [
            ("revoking", "certificate revoked"), ("strangers", "is not of the authority in"),
        ]),
        ("expired", [("ours", "has expired")]),
        ("other", [("other", "is not for the name '127.0.0.1'")]),
    ],
)  # fmt: skip
def test_a_registry_that_is_not_believed(
    kind: str, servers: str, cases: list[tuple[str, str]], folder: Path
) -> None:
    with keeping(kind, folder / servers) as port:
        for ours, word in cases:
            says = (f"the certificate of 127.0.0.1:{port}", word, "docs/pools.md")
            refused(url_of(kind, port), *tls_words(folder / ours), says=says)
            registering(url_of(kind, port), folder / ours, says[:2], folder / "ours")


def registering(url: str, certificates: Path, says: Sequence[str], servers: Path) -> None:
    """A server whose client's certificates are these goes on, and says what is wrong."""
    place = copy_with(certificates, f"{certificates.name}-registering")
    for name in ("server-cert.pem", "server-key.pem"):
        (place / name).write_bytes((servers / name).read_bytes())
    with serving("--register", url, *tls_words(place), listens=["unix:{folder}/pool"]) as server:
        until(lambda: "can't be registered" in server.log, "a word about it")
        assert all(word in server.log for word in says), server.log
    for file in place.iterdir():
        file.unlink()
    place.rmdir()


@pytest.mark.parametrize("kind", KINDS)
def test_a_registry_that_does_not_believe_us(kind: str, folder: Path) -> None:
    """Its authority is believed by us, so it is the client's certificate that is wrong."""
    with keeping(kind, folder / "ours") as port:
        for ours in ("strangers", "old-client"):
            authority = folder / "ours" / "ca-cert.pem"
            place = copy_with(folder / ours, f"{kind}-{ours}", authority)
            says = (f"127.0.0.1:{port}", "take the certificate in", str(place), "docs/pools.md")
            refused(url_of(kind, port), *tls_words(place), says=says)
            if ours == "old-client":
                registering(url_of(kind, port), place, ("take the certificate in",), place)


@pytest.mark.parametrize("kind", KINDS)
def test_a_registry_that_wants_tls_and_one_that_has_none(kind: str, folder: Path) -> None:
    ours = tls_words(folder / "ours")
    with keeping(kind, folder / "ours") as port:
        says = (f"127.0.0.1:{port}", "TLS", "--tls=require --tls-certificates FOLDER")
        refused(url_of(kind, port, tls=False), says=says)
        refused(url_of(kind, port, tls=False), "--tls=off", says=says)
    with keeping(kind, None) as port:
        start = "--tls=require" if kind == "http" else "--client-cert-auth"
        says = (f"127.0.0.1:{port} does not speak TLS", start)
        refused(url_of(kind, port), *ours, says=says)
        refused(url_of(kind, port, tls=False), *ours, says=(*says, "tls=off"))


def test_etcd_with_a_certificate_that_is_for_servers_alone(folder: Path) -> None:
    """Its gateway can't speak to itself: everybody meets this once."""
    with etcd(tls=folder / "servers-alone") as [member]:
        says = ("etcd said", "extendedKeyUsage clientAuth")
        refused(url_of("etcd", member.port), *tls_words(folder / "servers-alone"), says=says)


OFFHOST = [
    ("registry+http://192.0.2.1:7717", (), ("on another host", "--tls=require", "--tls=off")),
    ("registry+etcd://127.0.0.1:1,192.0.2.1:1/x", (), ("on another host", "--tls=off")),
    ("registry+https://127.0.0.1:7717", (), ("needs certificates", "--tls-certificates FOLDER")),
    ("registry+etcds://127.0.0.1:7717", (), ("needs certificates", "docs/pools.md")),
    ("registry+etcds://127.0.0.1:1", ("--tls=off",), ("needs certificates", "docs/pools.md")),
]


@pytest.mark.parametrize(("url", "words", "says"), OFFHOST)
def test_it_must_be_said_how_it_is_spoken_to(
    url: str, words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    """Before anything is sent: the addresses are nobody's.  A server does not even start."""
    refused(url, *words, says=(f"registry '{url}'", *says))
    text = refuses("--capacity", "8M", "--register", url, *words)
    assert all(word in text for word in says) and len(text.splitlines()) == 2, text


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_certificate_that_is_missing(kind: str, folder: Path) -> None:
    """A server has one of its own for others, and needs one more to register."""
    words = tls_words(folder / "no-client")
    says = (f"there is no {folder}/no-client/client-cert.pem that can be read", "docs/pools.md")
    refused(url_of(kind, 1), *words, says=says)
    text = refuses("--capacity", "8M", "--register", url_of(kind, 1), *words)
    assert all(word in text for word in says) and len(text.splitlines()) == 2, text


# ---- farmem pools, and servers with TLS


def test_pools_shows_servers_with_tls(folder: Path, tmp_path: Path) -> None:
    ours = tls_words(folder / "ours")
    with (
        serving(*ours, capacity="64M", listens=["127.0.0.1:0"]) as server,
        tls_nbdkit(tmp_path, folder / "ours") as other,
    ):
        url = f"tcp://127.0.0.1:{server.port}"
        done = pools("--json", url, other.url, *ours)
        assert done.returncode == 0, done.stdout
        found = {looked["url"]: looked for looked in json.loads(done.stdout)["servers"]}
        assert found[url]["free_bytes"] == 64 * MIB and found[url]["rtt_ns"] > 0
        assert found[other.url]["capacity_bytes"] == 512 * MIB
        for words, says in (
            ((), "--tls=require --tls-certificates FOLDER"),
            (tls_words(folder / "strangers"), "is not of the authority in"),
        ):
            done = pools(url, other.url, *words)
            assert done.returncode == 1
            first, second = done.stdout.splitlines()
            assert first.startswith(url) and says in first
            assert second.startswith(other.url)
    done = pools("tcp://192.0.2.1:7717")
    assert done.returncode == 1
    [line] = done.stdout.splitlines()
    for word in ("on another host", "--tls=require --tls-certificates FOLDER", "--tls=off"):
        assert word in line
