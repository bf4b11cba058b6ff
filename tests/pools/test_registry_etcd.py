"""A registry in etcd: against real ones, a single one and a cluster of three of which one dies.

What is checked is the same as with other registries; and that what else lies in etcd does no harm.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from farmem import registry as registries
from farmem.errors import FarmemError
from farmem.registry import Entry, Registry, parse_registry
from farmem.registry import etcd as registry_etcd
from tests.harness import assert_ok, compile_c, run_farmem
from tests.pools.etcd_servers import LIMIT_S, Member, etcd, registry_of, soon, url_of
from tests.pools.nbd_servers import free_port
from tests.pools.serving import serving, until
from tests.pools.watched import Watched

pytestmark = pytest.mark.pools
ENTRY = Entry("ab01", "tcp://rack7:7717", "rack7", "ab01", 1 << 30, 1 << 29)


def urls(registry: Registry) -> list[str]:
    return [entry.url for entry in registry.entries(soon())]


def test_an_entry_comes_stays_and_goes() -> None:
    with etcd() as members:
        registry, reader = registry_of(members), registry_of(members)
        registry.register(ENTRY, 2, soon())
        assert reader.entries(soon()) == [ENTRY]
        fuller = ENTRY._replace(free_bytes=0)
        for _ in range(6):
            registry.renew(fuller, 2, soon())
            time.sleep(0.5)
        assert reader.entries(soon()) == [fuller]
        registry.withdraw(ENTRY, soon())
        assert reader.entries(soon()) == []
        registry.withdraw(ENTRY, soon())


def test_what_is_not_renewed_goes_and_can_come_back() -> None:
    with etcd() as members:
        registry = registry_of(members)
        registry.register(ENTRY, 1, soon())
        until(lambda: urls(registry) == [], "its end", LIMIT_S)
        registry.renew(ENTRY, 5, soon())  # its lease is no more: it gets another
        assert urls(registry) == [ENTRY.url]


def test_prefixes_are_kept_apart_and_rubbish_is_passed_by() -> None:
    with etcd() as members:
        first, second = registry_of(members, "/a"), registry_of(members, "/b/c")
        first.register(ENTRY, 30, soon())
        second.register(ENTRY._replace(url="tcp://rack8:1"), 30, soon())
        members[0].put("/a/servers/xx", "not JSON")
        members[0].put("/a/servers/yy", '{"url": "mem:"}')
        members[0].put("/a/servers0", '{"url": "tcp://beyond:1"}')
        members[0].put("/a/other", '{"url": "tcp://beside:1"}')
        assert urls(first) == [ENTRY.url]
        assert urls(second) == ["tcp://rack8:1"]
        assert urls(registry_of(members)) == []


def test_it_waits_for_a_change() -> None:
    with etcd() as members:
        registry = registry_of(members)
        registry.register(ENTRY, 30, soon())
        assert registry.watch([], soon()) == [ENTRY]
        assert registry.watch([ENTRY], time.monotonic() + 0.1) == [ENTRY]


def test_it_is_told_of_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """etcd says so: nobody polls here.  A renewal is no change."""
    monkeypatch.setattr(registries, "POLL_SECONDS", 1e6)
    monkeypatch.setattr(registry_etcd, "POLL_SECONDS", 1e6)
    with etcd() as members:
        registry = registry_of(members)
        registry.register(ENTRY, 30, soon())
        other = ENTRY._replace(id="cd02", url="tcp://rack8:7717")
        for change, known, then in (
            (lambda: registry.register(other, 30, soon()), [ENTRY], [ENTRY, other]),
            (lambda: registry.withdraw(other, soon()), [ENTRY, other], [ENTRY]),
        ):
            watched = Watched(registry_of(members), known)
            until(lambda: members[0].watchers() == 1, "its question", LIMIT_S)
            registry.renew(ENTRY, 30, soon())
            change()
            assert watched.urls() == {entry.url for entry in then}


def test_a_member_that_is_dead_from_the_start() -> None:
    with etcd() as members:
        dead = Member(members[0].folder, "dead")
        registry = registry_of([dead, *members])
        registry.register(ENTRY, 30, soon())
        assert urls(registry) == [ENTRY.url]


def test_a_cluster_of_which_a_member_dies() -> None:
    with etcd(3) as members:
        registry = registry_of(members)
        registry.register(ENTRY, 30, soon())
        members[0].stop()

        def goes_on() -> bool:
            """Until there is a leader again nothing can be had."""
            try:
                registry.renew(ENTRY, 30, soon())
                return urls(registry) == [ENTRY.url]
            except FarmemError:
                return False

        until(goes_on, "the other two", LIMIT_S)
        assert urls(registry_of(members)) == [ENTRY.url]


def test_nobody_there() -> None:
    registry: Any = parse_registry(f"registry+etcd://127.0.0.1:{free_port()}/x")
    with pytest.raises(FarmemError, match=r"127\.0\.0\.1:\d+ can't be reached: .*refused"):
        registry.entries(soon())


def test_somebody_else_there() -> None:
    with serving() as server:
        registry = parse_registry(f"registry+etcd://127.0.0.1:{server.port}/x")
        with pytest.raises(FarmemError) as caught:
            registry.entries(soon())
    assert "there is nothing here" in caught.value.what and caught.value.hint


@pytest.mark.uffd
def test_servers_register_in_etcd_and_a_job_finds_them() -> None:
    with etcd() as members:
        url = url_of(members, "/farm")
        with (
            serving("--register", url, capacity="128M") as first,
            serving("--register", url, capacity="128M") as second,
        ):
            registry = registry_of(members, "/farm")
            until(lambda: len(urls(registry)) == 2, "both registered", LIMIT_S)
            result = run_farmem(
                [compile_c("verify"), "1", "128", "1"], local="32M", options=("--pool", url)
            )
            assert "MiB to" in first.log and "MiB to" in second.log
            assert first.end() == 0
            assert len(urls(registry)) == 1
    assert_ok(result)
