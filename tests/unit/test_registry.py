"""Registries without a network: their URLs, what may stand in them, and the one of a server."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farmem import poolservers
from farmem.errors import FarmemError
from farmem.pool.directory import WATCHERS_MAX, Directory, OwnRegistry
from farmem.pool.leases import Refused
from farmem.pools import Pool
from farmem.registry import ENTRIES_MAX, Entry, entry_of, parse_registry
from farmem.tls import Tls

SECRET = "0123456789abcdef" * 4
OTHER = "f" * 64
NS = 1_000_000_000


def document(url: str = "tcp://rack7:7717", **more: object) -> dict[str, object]:
    return {"url": url, "name": "rack7", "epoch": "abc", "ttl_ns": 10 * NS, **more}


def soon() -> float:
    return time.monotonic() + 5


# ---- URLs


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("registry+http://rack7", "is not understood"),
        ("registry+http://", "is not understood"),
        ("registry+http://rack7:7717/x", "is not understood"),
        ("registry+http://rack7:7717?size=8G", "the parameter 'size=8G'"),
        ("registry+http://rack7:7717?certificates=", "the parameter 'certificates='"),
        ("registry+http://rack7:7717?tls=maybe", "the parameter 'tls=maybe'"),
        ("registry+https://rack7:7717?tls=off", "the parameter 'tls=off'"),
        ("registry+etcds://rack7:7717/x?tls=off", "the parameter 'tls=off'"),
        ("registry+etcd://rack7:7717?tls=off&certificates=/x", "the parameter 'certificates=/x'"),
        ("registry+https://rack7", "is not understood"),
        ("registry+etcds://rack7", "names no port"),
        ("registry+etcd://rack7", "names no port"),
        ("registry+etcd://a:1,b/p", "names no port"),
        ("registry+etcd://a:1,/p", "names no host"),
        ("registry+etcd://a:1/" + "p" * 300, "prefix"),
        ("registry+etcd://a:1/p?q=1", "the parameter 'q=1'"),
        ("registry+file://x.toml", "three slashes"),
        ("registry+ftp://rack7:1", "there is no registry"),
        ("tcp://rack7:1", "there is no registry"),
        ("", "there is no registry"),
    ],
)
def test_a_wrong_url_is_refused_with_a_hint(url: str, named: str) -> None:
    with pytest.raises(FarmemError) as caught:
        parse_registry(url)
    assert named in caught.value.what and caught.value.hint


@given(st.sampled_from(["http", "https", "etcd", "etcds", "file"]), st.text(max_size=40))
def test_any_text_is_a_registry_or_a_farmem_error(kind: str, text: str) -> None:
    try:
        assert parse_registry(f"registry+{kind}://{text}").url.endswith(text)
    except FarmemError as error:
        assert error.hint


HERE, THERE = "127.0.0.1:1", "192.0.2.1:1"


@pytest.mark.parametrize(
    ("url", "mode", "refused"),
    [
        (f"registry+http://{HERE}", "", ""),
        (f"registry+etcd://{HERE}", "off", ""),
        (f"registry+http://{THERE}", "", "on another host"),
        (f"registry+etcd://{HERE},{THERE}", "", "on another host"),
        (f"registry+http://{THERE}", "off", ""),
        (f"registry+etcd://{HERE},{THERE}", "off", ""),
        (f"registry+http://{THERE}?tls=off", "require", ""),
        (f"registry+etcd://{HERE}/x", "require", "needs certificates"),
        (f"registry+http://{HERE}", "on", "needs certificates"),
        (f"registry+https://{HERE}", "off", "needs certificates"),
        (f"registry+etcds://{HERE}", "", "needs certificates"),
        (f"registry+etcds://{HERE}?certificates=/nosuch", "off", "no /nosuch/ca-cert.pem"),
        ("registry+http://name.invalid:1", "", ""),  # who that is may be known later
        ("registry+file:///nosuch.toml", "require", ""),
    ],
)
def test_tls_is_for_registries_what_it_is_for_servers(url: str, mode: str, refused: str) -> None:
    """As far as it can be seen before anybody is asked."""
    registry = parse_registry(url)
    registry.tls = Tls(mode)
    with pytest.raises(FarmemError, match=refused) if refused else nullcontext():
        registry.check(soon())


@given(
    st.dictionaries(st.sampled_from(["url", "name", "epoch", "free_bytes"]), st.from_type(object))
)
def test_whatever_was_registered_is_an_entry_or_nothing(found: dict[str, object]) -> None:
    entry = entry_of("1", found)
    assert entry is None or entry.url == found["url"]


def test_what_is_an_entry() -> None:
    whole = document(capacity_bytes=8, free_bytes=4)
    assert entry_of("7", whole) == Entry("7", "tcp://rack7:7717", "rack7", "abc", 8, 4)
    for wrong in (
        document("nbd://rack7/x"),
        document("mem:"),
        document("file:/x"),
        document("nonsense"),
        document(name="a\nb"),
        document(name="x" * 201),
        document(free_bytes=-1),
        document(free_bytes=True),
        document(free_bytes=1 << 63),
        [],
        None,
    ):
        assert entry_of("7", wrong) is None, wrong


# ---- a file


def test_a_file_names_servers(tmp_path: Path) -> None:
    path = tmp_path / "servers.toml"
    registry = parse_registry(f"registry+file://{path}")
    path.write_text('servers = ["tcp://a:1", "unix:///s", "tcp://a:1"]\n')
    assert [entry.url for entry in registry.entries(soon())] == ["tcp://a:1", "unix:///s"]
    path.write_text('servers = ["tcp://b:1"]\n')
    assert [entry.url for entry in registry.entries(soon())] == ["tcp://b:1"]
    with pytest.raises(FarmemError, match="can't be registered with"):
        registry.register(Entry("1", "tcp://a:1"), 5, soon())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("servers = [", "is not TOML"),
        ("", "no list of servers"),
        ('servers = "tcp://a:1"', "no list of servers"),
        ('servers = ["nbd://a/x"]', "'nbd://a/x' is no URL"),
        ("servers = [7]", "'7' is no URL"),
        ("x = '" + "x" * (1 << 20) + "'", "longer than"),
    ],
)
def test_a_file_that_can_not_be_used(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "servers.toml"
    registry = parse_registry(f"registry+file://{path}")
    with pytest.raises(FarmemError, match="No such file"):
        registry.entries(soon())
    path.write_text(text)
    with pytest.raises(FarmemError) as caught:
        registry.entries(soon())
    assert word in caught.value.what and caught.value.hint


# ---- the one that a server keeps


def test_what_is_not_renewed_goes() -> None:
    directory = Directory()
    directory.put("1", SECRET, document(), 100.0)
    directory.put("2", SECRET, document("tcp://rack8:7717"), 105.0)
    assert [entry.id for entry in directory.entries(109.9)] == ["1", "2"]
    assert [entry.id for entry in directory.entries(110.1)] == ["2"]
    directory.put("2", SECRET, document("tcp://rack8:7717", free_bytes=5), 114.0)
    assert [entry.free_bytes for entry in directory.entries(120.0)] == [5]
    directory.withdraw("2", SECRET, 121.0)
    assert directory.entries(121.0) == []


def test_whoever_waits_is_told_of_others_and_of_nothing_else() -> None:
    """A renewal, and what is free, are no change; what has expired is one, though nobody looks."""
    directory = Directory()

    async def told(version: str, seconds: float = 60) -> str:
        await directory.wait(version, seconds)
        return directory.version

    async def play() -> None:
        versions = [directory.version]
        for change in (
            lambda: directory.put("1", SECRET, document(), time.monotonic()),
            lambda: directory.put("2", SECRET, document(), time.monotonic()),
            lambda: directory.withdraw("2", SECRET, time.monotonic()),
        ):
            waiting = asyncio.ensure_future(told(versions[-1]))
            await asyncio.sleep(0)
            assert not waiting.done()
            change()
            versions.append(await waiting)
        directory.put("1", SECRET, document(ttl_ns=NS, free_bytes=7), time.monotonic())
        assert await told(versions[-1], 0) == versions[-1]
        assert await told("of another server") == versions[-1]
        versions.append(await told(versions[-1]))
        assert directory.entries(time.monotonic()) == []
        assert len(set(versions)) == len(versions)

    asyncio.run(play())


def test_too_many_that_wait_do_not() -> None:
    directory = Directory()

    async def play() -> None:
        waiting = [
            asyncio.ensure_future(directory.wait(directory.version, 60))
            for _ in range(WATCHERS_MAX)
        ]
        await asyncio.sleep(0)
        await directory.wait(directory.version, 60)
        assert not any(task.done() for task in waiting)
        directory.put("1", SECRET, document(), time.monotonic())
        await asyncio.gather(*waiting)
        waits = asyncio.ensure_future(directory.wait(directory.version, 60))
        await asyncio.sleep(0)
        assert not waits.done()
        waits.cancel()

    asyncio.run(play())


def test_a_job_learns_of_a_server_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list is never fetched anew by itself here."""
    monkeypatch.setattr(poolservers, "_LIST_SECONDS", 1e9)
    registry = OwnRegistry(Directory())
    sources = poolservers.Sources(Pool("x", 0, registry=registry), Tls())
    assert sources.choices(time.monotonic()) == []
    sources.watch()
    assert not sources.has_news()
    registry.register(Entry("1", "tcp://rack7:7717", "rack7", "abc", 8, 4), 60, soon())
    end = time.monotonic() + 60
    while not sources.has_news():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [server.url for server in sources.choices(time.monotonic())] == ["tcp://rack7:7717"]
    assert not sources.has_news()
    sources.stop()


def test_an_entry_is_its_makers() -> None:
    directory = Directory()
    directory.put("1", SECRET, document(), 100.0)
    for change in (
        lambda: directory.put("1", OTHER, document("tcp://evil:1"), 101.0),
        lambda: directory.withdraw("1", OTHER, 101.0),
    ):
        with pytest.raises(Refused) as caught:
            change()
        assert caught.value.status == 403
    assert [entry.url for entry in directory.entries(101.0)] == ["tcp://rack7:7717"]
    directory.put("1", OTHER, document("tcp://later:1"), 111.0)  # the first one has expired
    assert [entry.url for entry in directory.entries(111.0)] == ["tcp://later:1"]


@pytest.mark.parametrize(
    ("secret", "asked", "status"),
    [
        (SECRET, document("nbd://x/y"), 400),
        (SECRET, document(ttl_ns=5), 400),
        (SECRET, document(ttl_ns=None), 400),
        (SECRET, document(ttl_ns=True), 400),
        (SECRET, document(ttl_ns=10**15), 400),
        ("short", document(), 401),
        ("x" * 300, document(), 401),
    ],
)
def test_what_can_not_be_registered(secret: str, asked: dict[str, object], status: int) -> None:
    with pytest.raises(Refused) as caught:
        Directory().put("1", secret, asked, 0.0)
    assert caught.value.status == status


def test_a_registry_is_finite() -> None:
    directory = Directory()
    for number in range(ENTRIES_MAX):
        directory.put(str(number), SECRET, document(), 0.0)
    with pytest.raises(Refused) as caught:
        directory.put("more", SECRET, document(), 1.0)
    assert caught.value.status == 507
    directory.put("0", SECRET, document(), 1.0)
    directory.put("more", SECRET, document(), 10.5)  # the others have expired


def test_its_own_registry_is_one_like_others() -> None:
    registry = OwnRegistry(Directory())
    entry = Entry("1", "tcp://rack7:7717", "rack7", "abc", 8, 4)
    assert registry.watch([], time.monotonic()) == []
    registry.register(entry, 10, soon())
    registry.renew(entry._replace(free_bytes=2), 10, soon())
    assert registry.watch([], soon()) == [entry._replace(free_bytes=2)]
    registry.withdraw(entry, soon())
    registry.withdraw(entry, soon())
    assert registry.entries(soon()) == []
    with pytest.raises(FarmemError, match="no server that can be registered"):
        registry.register(entry._replace(url="mem:"), 10, soon())
