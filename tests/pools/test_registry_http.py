"""A registry that a `farmem serve` keeps: servers appear in it, stay as long as they renew, and go
when they drain or die; and `farmem pools` shows what is there.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from farmem import registry
from farmem.errors import FarmemError
from farmem.registry import Entry, parse_registry
from farmem.registry import http as registry_http
from tests.harness import FARMEM
from tests.pools.nbd_servers import free_port, nbd_server
from tests.pools.serving import MIB, Server, refuses, serving, until
from tests.pools.tls_run import Wire
from tests.pools.watched import Watched

pytestmark = pytest.mark.pools
LIMIT_S = 30


def registry_of(server: Server) -> str:
    return f"registry+http://127.0.0.1:{server.port}"


def url_of(server: Server) -> str:
    return f"tcp://127.0.0.1:{server.port}"


def listed(server: Server) -> dict[str, Entry]:
    found = parse_registry(registry_of(server)).entries(time.monotonic() + 5)
    return {entry.url: entry for entry in found}


def pools(*words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [str(FARMEM), "pools", *words], capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def shown(*words: str) -> tuple[int, dict[str, Any]]:
    status, out, _ = pools("--json", *words)
    return status, {found["url"]: found for found in json.loads(out)["servers"]}


# ---- registering


def test_a_server_registers_renews_and_withdraws() -> None:
    with serving("--registry", "--ttl", "1s", capacity="64M") as keeper:
        until(lambda: url_of(keeper) in listed(keeper), "its own entry")
        with serving(
            "--register", registry_of(keeper), "--name", "other", "--ttl", "1s", capacity="32M"
        ) as other:
            until(lambda: url_of(other) in listed(keeper), "the other's entry")
            entry = listed(keeper)[url_of(other)]
            assert (entry.name, entry.epoch) == ("other", other.about()["epoch"])
            assert (entry.capacity_bytes, entry.free_bytes) == (32 * MIB, 32 * MIB)
            # What is free is told anew each time: it has outlived its time to live by then.
            other.lease(10 * MIB)
            until(lambda: listed(keeper)[url_of(other)].free_bytes == 22 * MIB, "the new figure")
            time.sleep(1.5)
            assert url_of(other) in listed(keeper)
            assert other.end() == 0
            assert url_of(other) not in listed(keeper)


def test_one_that_drains_is_not_listed_while_it_does() -> None:
    with (
        serving("--registry", capacity="64M") as keeper,
        serving("--register", registry_of(keeper), "--drain-timeout", "60s") as other,
    ):
        until(lambda: url_of(other) in listed(keeper), "the entry")
        lease = other.lease(2 * MIB)
        other.process.send_signal(signal.SIGTERM)
        until(lambda: url_of(other) not in listed(keeper), "the withdrawal")
        assert other.renew(lease) == 200
        other.release(lease)


def test_one_that_is_killed_expires() -> None:
    with (
        serving("--registry", capacity="64M") as keeper,
        serving("--register", registry_of(keeper), "--ttl", "2s") as other,
    ):
        until(lambda: url_of(other) in listed(keeper), "the entry")
        url = url_of(other)
        other.process.kill()
        other.process.wait(LIMIT_S)
        until(lambda: url not in listed(keeper), "the end of the entry")
        assert url_of(keeper) in listed(keeper)


def test_a_registry_that_comes_later_and_goes_and_comes_back() -> None:
    """It is said that it can't be reached, and tried again."""
    port = free_port()
    url = f"registry+http://127.0.0.1:{port}"
    listens = (f"127.0.0.1:{port}",)
    with serving("--register", url, "--ttl", "1s") as other:

        def said(what: str, times: int) -> bool:
            return other.log.count(what) >= times

        for times in (1, 2):
            until(lambda times=times: said("can't be registered", times), "a word about it")
            with serving("--registry", listens=listens) as keeper:
                until(lambda keeper=keeper: url_of(other) in listed(keeper), "the entry")
                until(lambda times=times: said("registered as", times), "a word about that")
        assert other.process.poll() is None


def test_an_address_for_everybody_is_advertised_by_name_or_as_told() -> None:
    with serving("--registry", "--tls", "off", listens=("0.0.0.0:0",)) as keeper:
        [entry] = until(lambda: _entries_of(keeper), "the entry")
        assert not entry.url.startswith("tcp://0.0.0.0")
    with serving("--registry", "--advertise", "tcp://rack7:7") as keeper:
        assert until(lambda: listed(keeper), "the entry").keys() == {"tcp://rack7:7"}


def _entries_of(server: Server) -> list[Entry]:
    port = server.log.partition("listening on tcp://0.0.0.0:")[2].partition(",")[0]
    return parse_registry(f"registry+http://127.0.0.1:{port}").entries(time.monotonic() + 5)


def test_an_entry_belongs_to_who_made_it() -> None:
    with serving("--registry", capacity="64M") as keeper:
        [entry] = until(lambda: listed(keeper), "its entry").values()
        stranger = parse_registry(registry_of(keeper))
        for change in (
            lambda: stranger.register(entry._replace(url="tcp://evil:1"), 10, _soon()),
            lambda: stranger.withdraw(entry, _soon()),
        ):
            with pytest.raises(FarmemError, match="another's"):
                change()
        assert list(listed(keeper)) == [url_of(keeper)]
        number, path = "ab", "/v1/registry/ab"
        good = {"url": "tcp://rack7:1", "ttl_ns": 10**10}
        assert keeper.ask("PUT", path, good)[0] == 401
        assert keeper.ask("PUT", path, {**good, "url": "mem:"}, token="x" * 64)[0] == 400
        assert keeper.ask("PUT", path, b"{", token="x" * 64)[0] == 400
        assert keeper.ask("POST", path, good, token="x" * 64)[0] == 405
        assert keeper.ask("DELETE", path, token="x" * 64)[0] == 404
        assert keeper.ask("PUT", path, good, token="x" * 64)[0] == 200
        assert number in keeper.ask("GET", "/v1/registry")[1]["servers"]
        assert keeper.ask("DELETE", path, token="x" * 64)[0] == 204
        assert "x" * 64 not in keeper.log


def test_who_waits_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers when there is something to say: who asks again comes too late here."""
    monkeypatch.setattr(registry, "POLL_SECONDS", 1e6)
    monkeypatch.setattr(registry_http, "POLL_SECONDS", 1e6)
    with serving("--registry", capacity="64M") as keeper:
        known = list(until(lambda: listed(keeper), "its entry").values())

        def watched(known: list[Entry]) -> Watched:
            wire = Wire(keeper.port)
            found = Watched(parse_registry(f"registry+http://127.0.0.1:{wire.port}"), known)
            until(lambda: b"wait_ns" in wire.bytes_seen(), "its question")
            return found

        before = watched(known)
        with serving("--register", registry_of(keeper)) as other:
            assert before.urls() == {url_of(keeper), url_of(other)}
            after = watched(before.found)
        assert after.urls() == {url_of(keeper)}


def test_waiting_is_asked_for_properly() -> None:
    with serving("--registry") as keeper:
        until(lambda: listed(keeper), "its entry")
        status, first = keeper.ask("GET", "/v1/registry")
        assert status == 200
        version = first["version"]
        for wait in ("0", "1000000"):
            path = f"/v1/registry?version={version}&wait_ns={wait}"
            assert keeper.ask("GET", path) == (200, first)
        assert keeper.ask("GET", "/v1/registry?version=x&wait_ns=60000000000") == (200, first)
        for wait in ("", "-1", "1e3", "60000000001", "9" * 5000, "%C2%B2"):
            status, found = keeper.ask("GET", f"/v1/registry?version={version}&wait_ns={wait}")
            assert status == 400 and "wait_ns" in found["error"], wait


def _soon() -> float:
    return time.monotonic() + 5


def test_a_server_without_a_registry_has_none() -> None:
    with serving() as server:
        assert server.ask("GET", "/v1/registry")[0] == 404
        with pytest.raises(FarmemError, match="keeps no registry"):
            listed(server)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--register", "http://rack7:1"), "there is no registry"),
        (("--register", "registry+http://rack7"), "is not understood"),
        (("--advertise", "mem:"), "is no URL of a farmem serve"),
        (("--advertise", "nbd://rack7/x"), "is no URL of a farmem serve"),
    ],
)
def test_what_can_not_be_registered_is_refused_at_the_start(
    options: tuple[str, ...], word: str
) -> None:
    assert word in refuses("--capacity", "8M", *options)


def test_what_a_file_says_can_not_be_changed(tmp_path: Path) -> None:
    with serving("--register", f"registry+file://{tmp_path}/x.toml") as server:
        until(lambda: "can't be registered with" in server.log, "a word about it")


# ---- farmem pools


def test_pools_shows_servers_and_whether_they_answer() -> None:
    dead = f"tcp://127.0.0.1:{free_port()}"
    with serving("--name", "first", capacity="64M") as first, nbd_server(size_mib=8) as other:
        first.lease(10 * MIB)
        about = first.about()
        status, found = shown(url_of(first), f"unix://{first.path}", other.url)
        assert status == 0
        for url in (url_of(first), f"unix://{first.path}"):
            server = found[url]
            assert server["name"] == "first" and server["epoch"] == about["epoch"]
            assert (server["capacity_bytes"], server["free_bytes"]) == (64 * MIB, 54 * MIB)
            assert server["leases"] == 1 and server["rtt_ns"] > 0 and server["error"] is None
        assert found[other.url]["capacity_bytes"] == 8 * MIB
        assert found[other.url]["leases"] is None
        status, found = shown(url_of(first), dead)
        assert status == 1
        assert found[url_of(first)]["error"] is None
        assert "Connection refused" in found[dead]["error"]
        status, text, _ = pools(url_of(first), dead)
        assert status == 1
        head, line, failure = text.splitlines()
        assert head.split() == ["SERVER", "NAME", "CAPACITY", "FREE", "LEASES", "EPOCH", "RTT"]
        for word in (url_of(first), "first", "64.0 MiB", "54.0 MiB", about["epoch"], "ms"):
            assert word in line, line
        assert failure.startswith(dead) and "Connection refused" in failure


def test_pools_shows_what_is_registered() -> None:
    with serving("--registry", capacity="64M") as keeper:
        until(lambda: listed(keeper), "its entry")
        status, found = shown("--registry", registry_of(keeper))
        assert status == 0 and list(found) == [url_of(keeper)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "which servers to look at"),
        (("mem:",), "is no server"),
        (("--registry", "nonsense"), "there is no registry"),
        (("--registry", "registry+http://127.0.0.1:1"), "Connection refused"),
        (("--registry", "registry+file:///nosuch.toml"), "No such file"),
    ],
)
def test_pools_says_what_is_wrong(words: tuple[str, ...], said: str) -> None:
    status, out, err = pools(*words)
    assert status == 125 and said in err and not out
    assert len(err.splitlines()) >= 2, err
