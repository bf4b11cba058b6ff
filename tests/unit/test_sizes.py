"""Sizes, durations and chances: what is understood, and what is refused with a hint."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farmem.errors import FarmemError
from farmem.sizes import format_bytes, parse_chance_ppm, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("1048576", 1 << 20),
        ("4096B", 4096),
        ("4K", 4096),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("512MiB", 512 << 20),
        ("4G", 4 << 30),
        ("1.5GiB", 3 << 29),
        (" 2T ", 2 << 40),
        ("0.5K", 512),
        ("0", 0),
    ],
)
def test_a_size_is_understood(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "-1G",
        "1.5",
        "1.5B",
        "4iB",
        "4X",
        "4 G",
        "1e3",
        "0x10",
        "nan",
        "٣M",
        "1G1M",
        "1..5G",
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(FarmemError) as caught:
        parse_size(text, "local memory")
    assert "local memory" in caught.value.what
    assert "512M" in caught.value.hint


def test_a_decimal_looking_unit_is_refused_because_it_means_two_things() -> None:
    with pytest.raises(FarmemError) as caught:
        parse_size("512MB")
    assert "512MiB" in caught.value.hint


def test_a_size_beyond_any_machine_is_refused() -> None:
    with pytest.raises(FarmemError, match="address"):
        parse_size("99999999999T")


@given(st.integers(min_value=0, max_value=(1 << 63) - 1))
def test_a_plain_number_is_its_bytes(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_farmem_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except FarmemError as error:
        assert error.hint


@pytest.mark.parametrize(
    ("text", "duration_ns"), [("500ns", 500), ("10us", 10_000), ("1.5ms", 1_500_000), ("1s", 10**9)]
)
def test_a_duration_is_understood(text: str, duration_ns: int) -> None:
    assert parse_duration(text) == duration_ns


@pytest.mark.parametrize("text", ["", "10", "us", "-1us", "1m", "99999999999999s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(FarmemError):
        parse_duration(text, "rtt")


def test_a_chance_is_parts_per_million() -> None:
    assert [parse_chance_ppm(text) for text in ("0", "0.01", "1")] == [0, 10_000, 1_000_000]


@pytest.mark.parametrize("text", ["", "2", "-0.1", "nan", "often"])
def test_what_is_no_chance_is_refused(text: str) -> None:
    with pytest.raises(FarmemError):
        parse_chance_ppm(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (3 << 29, "1.5 GiB")]
)
def test_bytes_are_written_for_people(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text
