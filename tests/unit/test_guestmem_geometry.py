"""Page arithmetic and sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmem import geometry as geo

page_sizes = st.sampled_from([geo.TARGET_PAGE_BYTES << shift for shift in (0, 4, 9, 18)])
lengths = st.integers(min_value=0, max_value=1 << 50)


@given(lengths, page_sizes)
def test_aligning_brackets_the_value(value: int, unit: int) -> None:
    down, up = geo.align_down(value, unit), geo.align_up(value, unit)
    assert down <= value <= up < value + unit
    assert geo.is_aligned(down, unit)
    assert geo.is_aligned(up, unit)
    assert (down == up) == geo.is_aligned(value, unit)


@given(lengths, st.integers(min_value=1, max_value=1 << 30))
def test_touched_pages_are_those_that_hold_a_byte(offset: int, length: int) -> None:
    first, count = geo.touched_pages(offset, length)
    assert first * geo.TARGET_PAGE_BYTES <= offset < (first + 1) * geo.TARGET_PAGE_BYTES
    last = first + count - 1
    assert last == (offset + length - 1) // geo.TARGET_PAGE_BYTES


def test_an_empty_range_touches_nothing() -> None:
    assert geo.touched_pages(5 * geo.TARGET_PAGE_BYTES, 0) == (5, 0)


@given(lengths, lengths, page_sizes)
def test_host_page_range_covers_and_is_whole(offset: int, length: int, unit: int) -> None:
    start, whole = geo.host_page_range(offset, length, unit)
    assert start <= offset
    assert start + whole >= offset + length
    assert geo.is_aligned(start | whole, unit)


@given(st.integers(min_value=1, max_value=1 << 50))
def test_a_size_reads_back(length: int) -> None:
    assert geo.parse_size(geo.size_option(length)) == length


@pytest.mark.parametrize(
    ("text", "length"),
    [("2M", 2 << 20), ("1g", 1 << 30), ("64KiB", 64 << 10), ("17", 17), ("2 TB", None)],
)
def test_sizes_in_words(text: str, length: int | None) -> None:
    if length is None:
        with pytest.raises(ValueError, match="is not a size"):
            geo.parse_size(text)
    else:
        assert geo.parse_size(text) == length


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "2MM", "0x10", "²"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        geo.parse_size(text)


def test_target_pages_per_host_page() -> None:
    assert geo.target_pages_per(2 << 20) == 512
    assert geo.target_pages_per(geo.TARGET_PAGE_BYTES) == 1
    for wrong in (0, 1, 3 << 20, geo.TARGET_PAGE_BYTES // 2):
        with pytest.raises(ValueError, match="host page"):
            geo.target_pages_per(wrong)
