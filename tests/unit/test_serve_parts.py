"""Parts of the pool server by themselves: its log, what systemd is told, what is not installed."""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path

import pytest

from farmem.errors import FarmemError
from farmem.pool import nbdkit, notify
from farmem.pool.facts import Facts
from farmem.pool.leases import Leases, Quotas, Table
from farmem.pool.memory import Memory
from farmem.pool.metrics import text_of
from farmem.pool.sockets import Sockets, is_activated, parse_listen
from farmem.pool.tls import name_in
from farmem.restarts import LINES_PER_SECOND


def test_without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built where nbdkit's header was not."""
    monkeypatch.setattr(nbdkit, "PLUGIN", "no-such-plugin.so")
    with pytest.raises(FarmemError) as error:
        nbdkit.find_plugin()
    assert "without its nbdkit plugin" in error.value.what
    assert "apt-get install nbdkit-plugin-dev" in error.value.hint


def test_the_log_of_nbdkit(capsys: pytest.CaptureFixture[str]) -> None:
    """Line by line, without secrets, without what a terminal would obey, and not for ever."""
    read, write = os.pipe()
    log, token = nbdkit.Log(read), secrets.token_hex(32)
    os.write(write, f"nbdkit: a client asked for {token}\n\x1b[2Jb".encode())
    log.read()
    os.write(write, b"ad\n" + b"again\n" * 1000)
    log.read()
    log.read()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["farmem: nbdkit: a client asked for ...", "farmem: nbdkit: ?[2Jbad"]
    assert len(lines) <= 2 * LINES_PER_SECOND
    assert log.last == "again"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_notify(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(tmp_path / "n") if kind == "path" else f"@farmem-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify.notify("READY=1", "STATUS=x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"
    notify.notify("READY=1")  # nobody listens: no matter
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify.notify("READY=1")


def test_the_watchdogs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    for text, seconds in (("", 0), ("60000000", 30), ("soon", 0)):
        monkeypatch.setenv("WATCHDOG_USEC", text)
        assert notify.watchdog_seconds() == seconds
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_seconds() == 0


def test_metrics_are_in_prometheus_format() -> None:
    """Every sample stands below its own TYPE, and has a value and well-formed labels."""
    memory = Memory(False, 1 << 30)
    leases = Leases(64 << 20, 10**9, Quotas(0, {}), memory, Table(False, 0))
    leases.grant(1, 'a"b\\c', "", 0)
    label = r'[a-z_]+="(?:[^"\\\n]|\\["\\n])*"'
    sample = re.compile(rf"(farmem_pool_[a-z_]+)(?:{{{label}(?:,{label})*}})? [-+.e0-9]+")
    kind = ""
    for line in text_of(Facts('na"me', "0" * 16, leases, [])).splitlines():
        if line.startswith("# TYPE "):
            kind = line.split()[2]
            assert line.split()[3] in ("gauge", "counter")
            assert kind.endswith("_total") == (line.split()[3] == "counter")
        elif not line.startswith("# HELP "):
            match = sample.fullmatch(line)
            assert match and match[1] == kind, line


def test_addresses() -> None:
    assert parse_listen("127.0.0.1:0")[1:] == ("127.0.0.1", 0, "")
    assert parse_listen("[::1]:77")[1:] == ("::1", 77, "")
    assert parse_listen("tcp://localhost:77")[1:] == ("localhost", 77, "")
    assert parse_listen("unix:/run/x")[1:] == ("", 0, "/run/x")
    assert parse_listen("unix:///run/x")[1:] == ("", 0, "/run/x")


def test_sockets_that_are_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the environment may be another process's: only LISTEN_PID tells."""
    for pid, count, ours in ((os.getpid(), "1", True), (1, "1", False), (os.getpid(), "0", False)):
        monkeypatch.setenv("LISTEN_PID", str(pid))
        monkeypatch.setenv("LISTEN_FDS", count)
        assert is_activated() == ours
    with pytest.raises(FarmemError) as error:
        Sockets().open((), "")
    assert "nowhere to listen" in error.value.what


def test_whose_certificate_it_is() -> None:
    subject = ((("organizationName", "x"),), (("commonName", "alice"),))
    assert name_in({"subject": subject}) == "alice"
    assert name_in({"serialNumber": "77"}) == "certificate 77"
