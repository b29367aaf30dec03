"""The analyser's reader: look-ahead, packages, frames taken off; positions stay file offsets."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from migration.analyze.source import open_source
from migration.wire.errors import RemoteStreamError, TruncatedStreamError
from tests.support.analyze_streams import frames, source_of

BIG = 3 << 20


def test_reading_and_looking_ahead() -> None:
    """peek() takes nothing away, however far it looks."""
    data = bytes(range(256)) * (BIG // 256)
    source = source_of(data)
    assert source.peek(2 << 20) == data[: 2 << 20]
    assert source.position == 0
    assert source.read(5) == data[:5]
    source.skip(2 << 20)
    assert source.position == 5 + (2 << 20)
    assert source.read(3) == data[source.position - 3 : source.position]
    assert source.drain() == BIG - 8 - (2 << 20)
    assert source.at_end()


def test_the_end_of_the_file_is_a_truncated_stream() -> None:
    """With what was being read, and how much was left; nothing is consumed."""
    source = source_of(b"abc")
    source.section = "ram"
    with pytest.raises(TruncatedStreamError, match="4 bytes wanted, 3 left") as caught:
        source.read(4)
    assert (caught.value.offset, caught.value.section) == (0, "ram")
    assert source.read(3) == b"abc"


def test_a_lying_length_does_not_allocate() -> None:
    """4 GiB are asked for, three bytes are there."""
    with pytest.raises(TruncatedStreamError):
        source_of(b"abc").read(1 << 32)
    with pytest.raises(TruncatedStreamError):
        source_of(b"abc").skip(1 << 60)


def test_a_package_ends_where_it_says() -> None:
    """What runs past it is no truncated file but a wrong stream."""
    source = source_of(b"0123456789")
    source.read(2)
    with source.package(4):
        assert source.remaining_in_package == 4
        assert source.peek(100) == b"2345"
        with pytest.raises(
            RemoteStreamError, match="package ends: 5 bytes wanted, 4 left"
        ) as caught:
            source.read(5)
        assert not isinstance(caught.value, TruncatedStreamError)
        with pytest.raises(RemoteStreamError, match="package ends"):
            source.skip(5)
        assert source.read(4) == b"2345"
        assert source.at_end()
    assert source.read(1) == b"6"


def test_a_plain_file_is_seeked(tmp_path: Path) -> None:
    """Skipping a hole of a terabyte takes no time; past its end it is still an error."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        file.seek((1 << 40) - 3)
        file.write(b"end")
    with open_source(str(path)) as source:
        source.skip((1 << 40) - 3)
        assert source.position == (1 << 40) - 3
        assert source.read(3) == b"end"
    with open_source(str(path)) as source:
        source.read(1)
        source.skip((1 << 40) - 4)
        assert source.read(3) == b"end"


@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress, bz2.compress])
def test_compressed_files_are_unpacked(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """Known by their first bytes, whatever the name."""
    path = tmp_path / "stream.bin"
    path.write_bytes(pack(b"QEVM" * 1000))
    with open_source(str(path)) as source:
        assert source.read(4000) == b"QEVM" * 1000
        assert source.at_end()


@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress, bz2.compress])
def test_damaged_compressed_files_are_a_typed_error(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    """Cut in the middle, or a byte flipped."""
    whole = pack(bytes(range(256)) * 4000)
    path = tmp_path / "stream.bin"
    for damaged in (whole[: len(whole) // 2], whole[:-20] + b"\xff" * 20):
        path.write_bytes(damaged)
        with open_source(str(path)) as source, pytest.raises(RemoteStreamError):
            source.read(256 * 4000)


def test_frames_are_taken_off() -> None:
    """The plain part, then frames; positions count the frames' heads, consumed bytes do not."""
    data = bytes(range(200)) * 100
    source = source_of(b"plain" + frames(data, 1000))
    source.peek(4000)
    assert source.read(5) == b"plain"
    source.start_frames()
    assert source.position == 5
    assert source.read(10) == data[:10]
    assert source.position == 5 + 8 + 10
    assert source.read(1990) == data[10:2000]
    assert source.position == 5 + 2 * 1008
    assert source.peek(5000) == data[2000:7000]
    assert source.read(1) == data[2000:2001]
    assert source.position == 5 + 2 * 1008 + 8 + 1
    assert source.consumed == 5 + 2001
    assert source.read(len(data) - 2001) == data[2001:]
    assert source.at_end()


@pytest.mark.parametrize(
    ("damage", "reason", "offset"),
    [
        (lambda raw: raw[:-1], "ends inside a frame of 1000", 1008),
        (lambda raw: raw[:1012], "ends inside a frame header", 1008),
        (lambda raw: raw[:1500] + b"\xff" + raw[1501:], "wrong checksum", 1008),
        (lambda raw: raw[1008:], "wrong checksum", 0),
        (lambda raw: raw[:1008] * 2, "wrong checksum", 1008),
        (lambda raw: raw[:1008] + b"\0\0\0\0" + raw[1012:], "frame of 0 bytes", 1008),
        (lambda raw: raw[:1008] + b"\xff\0\0\0" + raw[1012:], "frame of 4278190080", 1008),
    ],
)
def test_damaged_frames(damage: Callable[[bytes], bytes], reason: str, offset: int) -> None:
    """A lost, repeated, cut or flipped frame is found, with its offset and number."""
    source = source_of(damage(frames(bytes(2000), 1000)))
    source.start_frames()
    with pytest.raises(RemoteStreamError, match=reason) as caught:
        source.read(2000)
    assert caught.value.offset == offset
    assert caught.value.section == f"frame {offset // 1008}"


def test_framed_channels_are_recognised() -> None:
    """Only by a right checksum."""
    whole = frames(b"some records", 12)
    assert source_of(whole).starts_with_frame()
    assert not source_of(whole[:-1]).starts_with_frame()
    assert not source_of(whole[:-1] + b"!").starts_with_frame()
    assert not source_of(b"").starts_with_frame()
