"""TLS as people ask for it: when a server must speak it, and when that is refused, before anything
is connected to; how the address of an agent is told to engines."""

import socket
import ssl
from pathlib import Path

import pytest

from farmem import lease, tls
from farmem.errors import FarmemError
from farmem.servers import Address, Server, is_loopback, parse_server
from farmem.tls import AUTHORITY, CERTIFICATE, KEY, OFF, ON, REQUIRE, Tls, client_context, parse_tls


def address(host: str) -> Address:
    if ":" in host:
        return Address(socket.AF_INET6, (host, 7717, 0, 0))
    return Address(socket.AF_INET, (host, 7717))


HERE, THERE = [address("127.0.0.1")], [address("192.0.2.7")]
TCP = parse_server("tcp://pool7:7717")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name in (AUTHORITY, CERTIFICATE, KEY):
        (tmp_path / name).touch()
    return str(tmp_path)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True),
        ("192.0.2.1", False), ("0.0.0.0", False), ("::ffff:192.0.2.1", False),
        ("fe80::1%eth0", False), ("2001:db8::1", False),
    ],
)  # fmt: skip
def test_what_is_this_host(host: str, loopback: bool) -> None:
    assert is_loopback(address(host)) == loopback


def test_nothing_said(folder: str) -> None:
    assert Tls().toward(TCP, HERE).mode == OFF
    assert Tls("", folder).toward(TCP, HERE) == Tls(REQUIRE, folder)
    assert Tls("", folder).toward(TCP, THERE) == Tls(REQUIRE, folder)
    with pytest.raises(FarmemError, match="on another host") as refusal:
        Tls().toward(TCP, THERE)
    assert "--tls=require" in refusal.value.hint and "--tls=off" in refusal.value.hint


def test_one_address_elsewhere_is_enough() -> None:
    with pytest.raises(FarmemError, match="on another host"):
        Tls().toward(TCP, [*HERE, *THERE])


def test_what_is_said_holds(folder: str) -> None:
    for where in (HERE, THERE):
        assert Tls(OFF, folder).toward(TCP, where).mode == OFF
        for mode in (ON, REQUIRE):
            assert Tls(mode, folder).toward(TCP, where) == Tls(mode, folder)


def test_the_url_can_say_it(folder: str) -> None:
    server = parse_server("nbds://pool7/export")
    assert server.port == 10809 and server.export == b"export" and not server.leases
    for mode in ("", OFF, ON, REQUIRE):
        assert Tls(mode, folder).toward(server, HERE).mode == REQUIRE
    with pytest.raises(FarmemError, match="needs certificates"):
        Tls().toward(server, HERE)


@pytest.mark.parametrize("url", ["unix:///run/pool", "nbd+unix:///?socket=/run/nbd"])
def test_unix_sockets_need_none(url: str) -> None:
    server: Server = parse_server(url)
    assert Tls(REQUIRE, "/nowhere").toward(server, []).mode == OFF


def test_certificates_that_are_missing(folder: str) -> None:
    for mode in (ON, REQUIRE):
        with pytest.raises(FarmemError, match="needs certificates"):
            Tls(mode).toward(TCP, HERE)
    (Path(folder) / KEY).unlink()
    with pytest.raises(FarmemError, match=f"there is no {folder}/{KEY}"):
        Tls(REQUIRE, folder).toward(TCP, HERE)


def test_certificates_that_are_rubbish(folder: str) -> None:
    with pytest.raises(FarmemError, match="can't be used"):
        client_context(folder)


def test_a_mode_that_there_is_not() -> None:
    assert parse_tls("on", "/x") == Tls(ON, "/x")
    with pytest.raises(FarmemError, match="no TLS mode 'yes'"):
        parse_tls("yes", "")


def test_a_folder_holds_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor, which leases more, has another current folder than the command had."""
    monkeypatch.chdir(tmp_path)
    assert parse_tls("", "x") == Tls("", str(tmp_path / "x"))
    assert parse_tls("", "") == Tls()


@pytest.mark.parametrize("error", [ssl.SSLEOFError(8, "EOF occurred"), BrokenPipeError()])
def test_a_server_that_hangs_up_behind_the_handshake_speaks_tls(
    error: OSError, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """How its end is seen, when it does not take our certificate, is a matter of who is faster."""

    def exchange(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(tls, "client_context", lambda _: None)
    monkeypatch.setattr(lease, "_exchange", exchange)
    control = lease.Control(TCP, HERE, Tls(REQUIRE, folder))
    with pytest.raises(FarmemError, match="does it take the certificate in"):
        control._exchanged(socket.socket(), b"", 0.0)


def test_addresses_as_the_kernel_and_other_programs_want_them() -> None:
    assert Address(socket.AF_UNIX, "/a").packed()[2:] == b"/a\0"
    assert Address(socket.AF_UNIX, "\0a").packed()[2:] == b"\0a"
    assert address("127.0.0.1").numeric() == ("127.0.0.1", "7717")
    assert Address(socket.AF_INET6, ("fe80::1", 1, 0, 3)).numeric() == ("fe80::1%3", "1")
