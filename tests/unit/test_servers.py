"""The URLs of pools on other hosts, as people write them: understood, or refused with a hint."""

import os
import socket
import threading
import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farmem import servers
from farmem.cli.options import Parsed, parse_registry
from farmem.errors import FarmemError
from farmem.pools import (
    SCHEMES,
    SERVER_SCHEMES,
    SERVERS_MAX,
    join_pools,
    parse_pool,
    smaller_pool_hint,
)
from farmem.servers import Address, Server, addresses_of, at_once, parse_server


def server(url: str) -> Server:
    [found] = parse_pool(url).servers
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("url", "host", "port", "path", "export", "name"),
    [
        ("tcp://rack7:7070", "rack7", 7070, "", b"", "rack7:7070"),
        ("tcp://rack7:7070/", "rack7", 7070, "", b"", "rack7:7070"),
        ("tcp://[::1]:7070", "::1", 7070, "", b"", "[::1]:7070"),
        ("rdma://rack7:7070", "rack7", 7070, "", b"", "rack7:7070"),
        ("unix:///run/farmem.sock", "", 0, "/run/farmem.sock", b"", "/run/farmem.sock"),
        ("unix:///run/a%20b", "", 0, "/run/a b", b"", "/run/a b"),
        ("nbd://rack7/disk", "rack7", 10809, "", b"disk", "rack7:10809"),
        ("nbd://rack7:1/a/b%2fc", "rack7", 1, "", b"a/b/c", "rack7:1"),
        ("nbd://[fe80::1]", "fe80::1", 10809, "", b"", "[fe80::1]:10809"),
        ("nbd://h/%ff", "h", 10809, "", b"\xff", "h:10809"),
        ("nbd+unix:///?socket=/s", "", 0, "/s", b"", "/s"),
        ("nbd+unix:///e?socket=/s", "", 0, "/s", b"e", "/s"),
    ],
)
def test_a_server_is_understood(
    url: str, host: str, port: int, path: str, export: bytes, name: str
) -> None:
    found = server(url)
    assert (found.host, found.port, found.path, found.export) == (host, port, path, export)
    assert found.name == name
    assert found.leases == url.startswith(("tcp:", "rdma:", "unix:"))
    assert found.by_rdma == url.startswith("rdma:")


def test_a_relative_socket_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    assert server("nbd+unix:///?socket=bin/s").path == "/usr/bin/s"


def test_the_size_of_a_lease() -> None:
    assert server("tcp://h:1").size_bytes is None
    assert server("tcp://h:1?size=8G").size_bytes == 8 << 30
    assert server("unix:///s?size=5M").size_bytes == 4 << 20
    assert "tcp://h:1?size=8G" in smaller_pool_hint(parse_pool("tcp://h:1?size=9T"))
    assert "export less" in smaller_pool_hint(parse_pool("nbd://h"))


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("tcp://rack7", "names no port"),
        ("tcp://:7070", "names no host"),
        ("tcp:rack7:7070", "is not understood"),
        ("tcp://rack7:0", "names no port"),
        ("tcp://rack7:99999", "is not understood"),
        ("tcp://rack7:x", "is not understood"),
        ("tcp://user@rack7:1", "is not understood"),
        ("tcp://rack7:1/export", "nothing belongs behind"),
        ("tcp://rack7:1?sise=8G", "has no parameter 'sise'"),
        ("tcp://rack7:1?size=8Q", "is not a size"),
        ("tcp://rack7:1?size=1M", "are the least"),
        ("tcp://rack7:1?size=1G&size=2G", "twice"),
        ("tcp://[::1:1", "is not understood"),
        ("rdma://rack7", "names no port"),
        ("rdma://rack7:1/export", "nothing belongs behind"),
        ("nbd://h/e?size=1G", "has no parameter"),
        ("nbd:///e", "names no host"),
        ("nbd+unix:///e", "names no socket"),
        ("nbd+unix://h/e?socket=/s", "three slashes"),
        ("nbd+unix:///e?socket=/" + "s" * 200, "107 bytes"),
        ("nbd://h/" + "e" * 2000, "2000 bytes"),
        ("unix://", "names no socket"),
        ("unix://run/farmem.sock", "three slashes"),
        ("nbds:///e", "names no host"),
    ],
)
def test_a_wrong_url_is_refused_with_a_hint(url: str, named: str) -> None:
    with pytest.raises(FarmemError) as caught:
        parse_pool(url)
    assert named in caught.value.what
    assert caught.value.hint


@given(st.sampled_from(["tcp", "rdma", "unix", "nbd", "nbd+unix"]), st.text(max_size=40))
def test_any_text_is_a_server_or_a_farmem_error(scheme: str, text: str) -> None:
    for url in (f"{scheme}:{text}", f"{scheme}://{text}"):
        try:
            found = parse_server(url)
            assert found.path or (found.host and found.port)
        except FarmemError as error:
            assert error.hint


def test_servers_are_joined_and_others_are_not() -> None:
    first, second = parse_pool("tcp://rack7:1"), parse_pool("nbd://rack8/e")
    assert join_pools([first]) is first
    both = join_pools([first, second])
    assert both.servers == (*first.servers, *second.servers)
    assert both.url == "tcp://rack7:1 nbd://rack8/e"
    assert both.capacity_bytes == 0 and not both.path
    many = [parse_pool(f"tcp://rack7:{port}") for port in range(1, SERVERS_MAX + 2)]
    assert len(join_pools(many[:-1]).servers) == SERVERS_MAX
    for wrong, word in (
        ([first, parse_pool("mem:8M")], "'mem:8M' is no server"),
        ([first, second, first], "'tcp://rack7:1' is named twice"),
        (many, f"{SERVERS_MAX} are the most"),
    ):
        with pytest.raises(FarmemError) as caught:
            join_pools(wrong)
        assert word in f"{caught.value.what}; {caught.value.hint}"


def test_pools_in_a_variable_are_told_apart_by_their_schemes() -> None:
    split = Parsed("pool", parse_pool).split_envvar_value
    assert split("mem:") == ["mem:"]
    assert split("file:/a b") == ["file:/a b"]
    assert split(" tcp://a:1  nbd+unix:///?socket=/s ") == ["tcp://a:1", "nbd+unix:///?socket=/s"]
    assert split("file:/a b mem:1G") == ["file:/a b", "mem:1G"]
    assert Parsed("filter", str).split_envvar_value("a b") == ["a", "b"]


# One of each kind that --pool takes.
OF_EACH_KIND = [
    "mem:1G", "file:/tmp", "tcp://a:1", "rdma://[::1]:1?size=8G", "unix:///run/a b", "nbd://a/x",
    "nbds://a/x", "nbd+unix:///x?socket=/s", "registry+http://a:1", "registry+https://a:1",
    "registry+etcd://a:1,b:2/farm", "registry+etcds://a:1,b:2/farm?certificates=/etc/a b",
    "registry+file:///etc/a b.toml",
]  # fmt: skip


def test_whatever_a_pool_can_be_can_stand_in_a_variable() -> None:
    """Each behind each other one, as many as you like."""
    kinds = {url.partition(":")[0] for url in OF_EACH_KIND}
    assert kinds == {*SCHEMES, *SERVER_SCHEMES}
    option = Parsed("pool", parse_pool)
    for first in OF_EACH_KIND:
        assert option.convert(first, None, None).url == first
        for second in OF_EACH_KIND:
            assert option.split_envvar_value(f"{first} {second}") == [first, second]
    both = " ".join(OF_EACH_KIND)
    assert option.split_envvar_value(both) == OF_EACH_KIND


def test_registries_in_a_variable_are_told_apart_like_pools() -> None:
    option = Parsed("registry", parse_registry)
    urls = [url for url in OF_EACH_KIND if url.startswith("registry+")]
    assert option.split_envvar_value(" ".join(urls)) == urls
    assert [option.convert(url, None, None).url for url in urls] == urls


def test_calls_at_once_do_not_wait_for_each_other() -> None:
    both = threading.Barrier(3, timeout=60)

    def call(number: int) -> int:
        both.wait()
        return number

    assert at_once([partial(call, number) for number in (7, 8, 9)]) == [7, 8, 9]
    assert at_once([]) == []


def test_an_address_is_what_the_kernel_wants() -> None:
    """The struct sockaddr of the C headers: family, port and address in their places."""
    four = Address(socket.AF_INET, ("127.0.0.1", 0x1234)).packed()
    assert four == b"\x02\0\x12\x34\x7f\0\0\x01" + bytes(8)
    six = Address(socket.AF_INET6, ("::1", 0x1234, 0, 3))
    assert six.packed() == b"\x0a\0\x12\x34" + bytes(19) + b"\x01\x03\0\0\0"
    assert six.with_port(6) == Address(socket.AF_INET6, ("::1", 6, 0, 3))
    assert Address(socket.AF_UNIX, "/s").packed() == b"\x01\x00/s\x00"


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30) or [])
    with pytest.raises(TimeoutError, match="looked up"):
        addresses_of(server("tcp://rack7:1"), time.monotonic() + 0.05)


def test_why_is_in_words() -> None:
    assert servers.why(TimeoutError("timed out")) == "it does not answer"
    assert servers.why(ConnectionRefusedError(111, os.strerror(111))) == "Connection refused"
