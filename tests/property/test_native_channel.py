"""A channel's reader: however the bytes are cut up on the way, and whatever is asked for, the same
bytes come out; a cut or changed stream is an error exactly where it ought to be.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.native import crc32c
from migration.runtime.channel import Channel
from migration.wire.errors import RemoteStreamError, TruncatedStreamError

FRAME_MAX = 128 << 10
PEEK_MAX = 4096
DATA = st.binary(min_size=1, max_size=3000)
CUTS = st.lists(st.integers(0, 3000), max_size=8)
WANTS = st.lists(st.tuples(st.booleans(), st.integers(0, 700)), max_size=40)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """``data`` cut at these places."""
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


def frames(parts: list[bytes]) -> list[bytes]:
    """Each part in a frame of its own, as ``csrc/chan.h`` says; none for an empty part."""
    framed: list[bytes] = []
    for part in filter(None, parts):
        head = struct.pack(">QI", len(framed), len(part))
        framed.append(struct.pack(">II", len(part), crc32c(part, crc32c(head))) + part)
    return framed


@contextmanager
def reader(*, framed: bool) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the socket that talks to it."""
    ours, theirs = socket.socketpair()
    channel = Channel.over_socket(ours, peer="the test")
    try:
        if framed:
            channel.set_read_framed()
        yield channel, theirs
    finally:
        theirs.close()
        channel.close()


def feed(theirs: socket.socket, parts: list[bytes]) -> None:
    """Small enough to wait in the socket; a reader sees the borders as the kernel likes."""
    for part in parts:
        if part:
            theirs.send(part)
    theirs.shutdown(socket.SHUT_WR)


def read_all(channel: Channel, wants: list[tuple[bool, int]]) -> bytes:
    """Read and peek as ``wants`` says, then the rest one by one."""
    got = b""
    for is_peek, length in wants:
        ahead = channel.peek(length)
        if is_peek or len(ahead) < length:
            assert channel.position == len(got)
            continue
        data = channel.read(length)
        assert data == ahead
        got += data
        assert channel.position == len(got)
    while channel.peek(1):
        got += channel.read(1)
    return got


@pytest.mark.parametrize("framed", [False, True], ids=["plain", "framed"])
@given(data=DATA, cuts=CUTS, wire_cuts=CUTS, wants=WANTS)
def test_every_split_reads_the_same(
    framed: bool, data: bytes, cuts: list[int], wire_cuts: list[int], wants: list[tuple[bool, int]]
) -> None:
    """Cut into frames anywhere, and the frames sent in any pieces."""
    wire = b"".join(frames(pieces(data, cuts))) if framed else data
    with reader(framed=framed) as (channel, theirs):
        feed(theirs, pieces(wire, wire_cuts))
        assert read_all(channel, wants) == data
        with pytest.raises(TruncatedStreamError) as caught:
            channel.read(1)
        assert caught.value.offset == len(data)
        assert channel.bytes_received == len(wire)


def test_every_single_place_of_a_cut() -> None:
    """Exhaustively for a short stream of two frames."""
    wire = b"".join(frames([b"some", b"bytes"]))
    for at in range(len(wire) + 1):
        with reader(framed=True) as (channel, theirs):
            feed(theirs, [wire[:at], wire[at:]])
            assert channel.read(9) == b"somebytes"


@given(data=DATA, cuts=CUTS, length=st.integers(0, 3200))
def test_a_cut_stream_of_frames(data: bytes, cuts: list[int], length: int) -> None:
    """Whole frames are handed out; a cut between two is a clean end, inside one an error."""
    framed = frames(pieces(data, cuts))
    wire = b"".join(framed)[:length]
    whole, borders = 0, {0}
    for frame in framed:
        borders.add(max(borders) + len(frame))
        if max(borders) <= len(wire):
            whole += len(frame) - 8
    with reader(framed=True) as (channel, theirs):
        feed(theirs, [wire])
        assert channel.read(whole) == data[:whole]
        with pytest.raises(RemoteStreamError) as caught:
            channel.read(1)
        assert caught.value.offset == whole
        assert isinstance(caught.value, TruncatedStreamError) == (len(wire) in borders)


@given(data=DATA, cuts=CUTS, change=st.data())
def test_one_changed_byte_in_a_stream_of_frames(
    data: bytes, cuts: list[int], change: st.DataObject
) -> None:
    """Everything before its frame is handed out, nothing of it or behind it."""
    framed = frames(pieces(data, cuts))
    wire = bytearray(b"".join(framed))
    at = change.draw(st.integers(0, len(wire) - 1))
    wire[at] ^= change.draw(st.integers(1, 255))
    good, start, number = 0, 0, 0
    for frame in framed:
        if start + len(frame) > at:
            break
        start, good, number = start + len(frame), good + len(frame) - 8, number + 1
    with reader(framed=True) as (channel, theirs):
        feed(theirs, [bytes(wire)])
        assert channel.read(good) == data[:good]
        with pytest.raises(RemoteStreamError, match=f"frame {number} ") as caught:
            channel.read(1)
        assert caught.value.section == "frame"
        assert caught.value.offset == good


@given(before=st.binary(max_size=300), after=st.binary(min_size=1, max_size=300), cuts=CUTS)
def test_frames_begin_in_the_middle(before: bytes, after: bytes, cuts: list[int]) -> None:
    """At the next unread byte, also when bytes of both kinds came together."""
    wire = before + b"".join(frames([after]))
    with reader(framed=False) as (channel, theirs):
        feed(theirs, pieces(wire, cuts))
        assert channel.read(len(before)) == before
        channel.set_read_framed()
        assert channel.read(len(after)) == after


@pytest.mark.parametrize("framed", [False, True], ids=["plain", "framed"])
@given(writes=st.lists(st.tuples(st.booleans(), st.binary(max_size=2000)), max_size=12))
def test_what_is_written_is_read(framed: bool, writes: list[tuple[bool, bytes]]) -> None:
    """Flushed or not in between; positions count the bytes without frames."""
    ours, theirs = socket.socketpair()
    source, destination = (Channel.over_socket(end, peer="other") for end in (ours, theirs))
    try:
        if framed:
            source.set_write_framed()
            destination.set_read_framed()
        for flushes, data in writes:
            source.write(data)
            if flushes:
                source.flush()
        source.flush()
        expected = b"".join(data for _, data in writes)
        assert source.write_position == len(expected)
        assert destination.read(len(expected)) == expected
        assert source.bytes_sent == destination.bytes_received
    finally:
        source.close()
        destination.close()


@pytest.mark.parametrize("length", [0, FRAME_MAX + 1, 0xFFFFFFFF])
def test_a_length_no_frame_has(length: int) -> None:
    with reader(framed=True) as (channel, theirs):
        feed(theirs, [struct.pack(">II", length, 0) + bytes(100)])
        with pytest.raises(RemoteStreamError, match="not a frame header"):
            channel.read(1)


def test_the_largest_frame_and_the_longest_look_ahead() -> None:
    """A frame of 128 KiB passes; a peek across two is put together."""
    data = bytes(range(256)) * (FRAME_MAX // 256) + b"tail"
    with reader(framed=True) as (channel, theirs):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * FRAME_MAX)
        feed(theirs, frames([data[:FRAME_MAX], data[FRAME_MAX:]]))
        channel.read(FRAME_MAX - 2)
        assert channel.peek(PEEK_MAX) == data[FRAME_MAX - 2 :]
        assert channel.read(6) == data[-6:]
