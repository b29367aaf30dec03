"""Sizes and switches as people write them."""

from __future__ import annotations

import pytest

from migration.monitor.units import format_size, parse_size, parse_switch


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("1.5G", 3 << 29),
        ("4096", 4096),
        ("64KiB", 65536),
        ("1b", 1),
        ("2t", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_plain_number_counts_in_the_default_unit() -> None:
    assert parse_size("1", default_unit="M") == 1 << 20
    assert parse_size("1B", default_unit="M") == 1


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5", "1X", "1 2", "0x10", "16777216T", "٣"])
def test_not_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|bytes|bits"):
        parse_size(text)


def test_format_is_short() -> None:
    assert [format_size(n) for n in (0, 4097, 512 << 20, 3 << 29)] == [
        "0 B",
        "4.0 KiB",
        "512 MiB",
        "1.5 GiB",
    ]


def test_switches() -> None:
    assert parse_switch("on") is True
    assert parse_switch("OFF") is False
    with pytest.raises(ValueError, match="maybe"):
        parse_switch("maybe")
