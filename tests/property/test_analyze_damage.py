"""Damaged streams end in a typed error with a place, in bounded memory: no crash, no hang."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from migration.analyze.events import EndEvent, ErrorEvent, Event, SectionEvent
from migration.analyze.session import RoleError
from migration.wire.constants import SectionType
from tests.support.analyze_streams import analyse
from tests.support.analyze_vectors import content, recording

MEMORY_MAX = 64 << 20
LONG = settings(max_examples=2 * settings().max_examples)
NAMES = (
    ("7.2", "none-zero-1m"),
    ("7.2", "none-uuid-validate-1m"),
    ("7.2", "none-ignore-shared-1m"),
    ("7.2", "none-noconfig-nofooter-noglobalstate-1m"),
    ("7.2", "none-dirty-bitmaps-postcopy-1m"),
    ("7.2", "none-compress-2m"),
    ("7.2", "pc-devices-paused-tcg-8m"),
    ("7.2", "pc-xbzrle-8m"),
)
"""One of each kind; those with many pages are cut down by :func:`shortened`."""


@cache
def streams() -> tuple[bytes, ...]:
    """The recordings the damage is done to."""
    found = [content(recording(*each).to_destination[0]) for each in NAMES]
    return tuple(shortened(data) for data in found)


def shortened(data: bytes) -> bytes:
    """The stream without its longest RAM sections: what is left of it is still a whole stream."""
    out = bytearray()
    at = 0
    for event in analyse(data):
        is_long = isinstance(event, SectionEvent) and event.length > 16 << 10
        if is_long and isinstance(event, SectionEvent) and event.header.type is SectionType.PART:
            out += data[at : event.offset]
            at = event.offset + event.length
    return bytes(out + data[at:])


@cache
def multifd() -> tuple[bytes, ...]:
    """Main and both channels of a compressed multifd migration."""
    return tuple(content(path) for path in recording("7.2", "none-multifd-zlib-2m").to_destination)


@cache
def return_path() -> bytes:
    """Requests, a bitmap, acknowledgements."""
    first, second = recording("7.2", "none-postcopy-recover-2m").to_source
    return content(first) + content(second)


def check(events: list[Event], length: int) -> None:
    """One verdict, at the end, inside the file, with a section or between two."""
    *body, last = events
    assert isinstance(last, EndEvent | ErrorEvent)
    assert not any(isinstance(event, EndEvent | ErrorEvent) for event in body)
    assert 0 <= last.offset <= length
    if isinstance(last, ErrorEvent):
        assert last.message
        assert last.section is not None or last.last_good is not None


@LONG
@given(st.data())
def test_every_truncation_is_an_error_at_the_cut(data: st.DataObject) -> None:
    """A shorter stream is never mistaken for a whole one, unless only the description is gone."""
    stream = data.draw(st.sampled_from(streams()))
    length = data.draw(st.integers(0, len(stream) - 1))
    events = analyse(stream[:length])
    check(events, length)
    if length and isinstance(events[-1], EndEvent):
        # The EOF byte is the last thing that is needed; the description may be missing whole.
        assert stream[length - 1 : length + 1] == b"\0\x06"


@LONG
@given(st.data())
def test_flipped_bytes_end_in_a_verdict(data: st.DataObject) -> None:
    """One to eight of them, anywhere."""
    stream = bytearray(data.draw(st.sampled_from(streams())))
    places = st.tuples(st.integers(0, len(stream) - 1), st.integers(1, 255))
    for at, change in data.draw(st.lists(places, min_size=1, max_size=8)):
        stream[at] ^= change
    check(analyse(bytes(stream)), len(stream))


@LONG
@given(st.data())
def test_pieces_swapped_or_repeated_end_in_a_verdict(data: st.DataObject) -> None:
    """Lengths and ids that are right, in the wrong place."""
    stream = data.draw(st.sampled_from(streams()))
    cuts = sorted(data.draw(st.lists(st.integers(8, len(stream)), min_size=3, max_size=3)))
    first, second, third = cuts
    pieces = [stream[:first], stream[first:second], stream[second:third], stream[third:]]
    order = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    damaged = pieces[0] + b"".join(pieces[index] for index in order)
    check(analyse(damaged), len(damaged))


@LONG
@given(st.data())
def test_damaged_companion_channels_end_in_a_verdict(data: st.DataObject) -> None:
    """The main channel is whole; the error names the channel's file."""
    channels = [bytearray(each) for each in multifd()]
    victim = data.draw(st.integers(1, 2))
    at = data.draw(st.integers(8, len(channels[victim]) - 1))
    if data.draw(st.booleans()):
        del channels[victim][at:]
    else:
        channels[victim][at] ^= data.draw(st.integers(1, 255))
    events = analyse(*(bytes(each) for each in channels))
    check(events, max(len(each) for each in channels))
    last = events[-1]
    if isinstance(last, ErrorEvent):
        assert f"channel {victim}" in last.message


@LONG
@given(st.data())
def test_damaged_return_paths_end_in_a_verdict(data: st.DataObject) -> None:
    """Also when a bitmap's size lies."""
    stream = bytearray(return_path())
    at = data.draw(st.integers(0, len(stream) - 1))
    if data.draw(st.booleans()):
        del stream[at:]
    else:
        stream[at] ^= data.draw(st.integers(1, 255))
    check(analyse(streams()[0], return_path=bytes(stream)), max(len(stream), len(streams()[0])))


@LONG
@example(noise=b"\x08\x00\x01", with_header=False)  # a recovery that ends in its first command
@given(st.binary(max_size=2000), st.booleans())
def test_noise_is_no_stream(noise: bytes, with_header: bool) -> None:
    """Random bytes, bare or behind a good header."""
    stream = (b"QEVM\0\0\0\3" if with_header else b"") + noise
    with suppress(RoleError):  # noise that starts as another channel would
        check(analyse(stream), len(stream))


@pytest.mark.parametrize("start", range(len(NAMES)))
def test_memory_is_bounded_whatever_a_length_says(start: int) -> None:
    """The first bytes set to their largest value, one or a stretch of them: lengths lie most."""
    stream = streams()[start]
    tracemalloc.start()
    try:
        step = 3 if len(stream) < 16 << 10 else 40  # tracing makes many devices slow
        for at in range(8, min(len(stream) - 8, 400), step):
            for width in (1, 4, 8):
                damaged = stream[:at] + b"\xff" * width + stream[at + width :]
                check(analyse(damaged), len(damaged))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_MAX
