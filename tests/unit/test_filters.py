"""--filter and --pool: their spelling, and how a filter lies in the control segment."""

import os

import pytest

from farmem import _native
from farmem.errors import FarmemError
from farmem.filters import parse_filter, parse_filters, write_filters
from farmem.pools import EXTENT_BYTES, host_memory_bytes, parse_pool

ffi, lib = _native.ffi, _native.lib


def test_filters_lie_in_the_control_segment_outermost_first() -> None:
    control = ffi.new("struct fm_control *")
    texts = (
        "stats",
        "delay:bandwidth=1G/s,rtt=10us",
        "error:seed=7,fetch=0.5,corrupt=0.01,file=armed",
        "checksum",
    )
    write_filters(parse_filters(texts), control, lib)
    assert control.filters == 4
    kinds = [control.filter[i].kind for i in range(5)]
    assert kinds == [
        lib.FM_FILTER_STATS,
        lib.FM_FILTER_DELAY,
        lib.FM_FILTER_ERROR,
        lib.FM_FILTER_CHECKSUM,
        lib.FM_FILTER_NONE,
    ]
    assert list(control.filter[1].params)[:3] == [10_000, 1 << 30, 0]
    assert list(control.filter[2].params)[:5] == [500_000, 0, 10_000, 7, 0]
    assert ffi.string(control.filter[2].path).decode() == os.path.abspath("armed")
    assert ffi.string(control.filter[1].path) == b""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "zip",
        "stats:",
        "stats:x=1",
        "delay:rtt",
        "delay:rtt=1",
        "delay:rtt=1us,rtt=2us",
        "delay:file=x",
        "error:fetch=2",
        "error:seed=-1",
        "error:seed=99999999999999999999",
        "error:file=",
        "error:file=" + "x" * 200,
    ],
)
def test_a_bad_filter_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(FarmemError) as caught:
        parse_filter(text)
    assert caught.value.hint


def test_more_filters_than_the_control_segment_holds_are_refused() -> None:
    assert len(parse_filters(("stats",) * 8)) == 8
    with pytest.raises(FarmemError):
        parse_filters(("stats",) * 9)


def test_the_default_pool_is_as_large_as_the_host_in_whole_extents() -> None:
    pool = parse_pool("mem:")
    assert pool.capacity_bytes % EXTENT_BYTES == 0
    assert 0 <= host_memory_bytes() - pool.capacity_bytes < EXTENT_BYTES


def test_a_pool_size_is_rounded_down_to_whole_extents() -> None:
    assert parse_pool("mem:5M").capacity_bytes == 4 << 20


@pytest.mark.parametrize("url", ["", "mem", "rdma://rack7", "mem:x", "mem:1M", "mem:0"])
def test_a_bad_pool_is_refused_with_a_hint(url: str) -> None:
    with pytest.raises(FarmemError) as caught:
        parse_pool(url)
    assert caught.value.hint
