"""The three functions and the buffered ends over them: order, positions, errors that stick."""

from __future__ import annotations

import io
import os
import socket
import tempfile
from pathlib import Path

import pytest

from migration.runtime.channel_ops import ChannelOps, channel_ops
from migration.runtime.errors import ChannelError
from migration.runtime.file_channel import FileReader, FileWriter
from migration.wire import headers
from migration.wire.errors import TruncatedStreamError
from migration.wire.headers import Configuration


class Store:
    """The three functions over bytes in memory, taking and giving only a few at a time."""

    name = "the store"

    def __init__(self, data: bytes = b"", *, step: int = 7) -> None:
        self.data = bytearray(data)
        self.step = step
        self.calls: list[tuple[str, int]] = []
        self.closed = 0
        self.fail_at: int | None = None

    def put_buffer(self, data: memoryview, position: int) -> int:
        self.calls.append(("put", position))
        if self.fail_at is not None and position >= self.fail_at:
            raise OSError(28, "No space left on device")
        taken = bytes(data[: self.step])
        self.data[position : position + len(taken)] = taken
        return len(taken)

    def get_buffer(self, position: int, length: int) -> bytes:
        self.calls.append(("get", position))
        return bytes(self.data[position : position + min(length, self.step)])

    def close(self) -> None:
        self.closed += 1


def test_what_is_written_is_read_whatever_the_pieces() -> None:
    """Short takes and gives are continued where they stopped; positions count stream bytes."""
    store = Store()
    payload = bytes(range(256)) * 3 + b"rest"
    writer = FileWriter(store, buffer_bytes=128)
    for at in range(0, len(payload), 33):
        writer.write(payload[at : at + 33])
    assert writer.position == len(payload)
    assert writer.bytes_transferred < len(payload)  # the rest is buffered
    writer.close()
    assert bytes(store.data) == payload
    assert writer.bytes_transferred == len(payload)
    puts = [position for kind, position in store.calls if kind == "put"]
    assert puts == sorted(puts)

    reader = FileReader(store)
    assert reader.peek(20) == payload[:20]
    assert reader.position == 0
    assert reader.read(300) == payload[:300]
    assert reader.peek(10_000) == payload[300:]
    assert reader.read(len(payload) - 300) == payload[300:]
    assert reader.position == reader.bytes_transferred == len(payload)
    assert reader.peek(1) == b""
    assert reader.read_some(5) == b""
    reader.close()
    assert store.closed == 2  # each end closes once


def test_codecs_work_on_them() -> None:
    """They are the wire room's Writer and Reader."""
    store = Store()
    with FileWriter(store) as writer:
        headers.write_file_header(writer)
        headers.write_configuration(writer, Configuration("none", capabilities=("mapped-ram",)))
    reader = FileReader(store)
    headers.read_file_header(reader)
    headers.read_section_type(reader)
    assert headers.read_configuration(reader).capabilities == ("mapped-ram",)


def test_the_first_error_sticks() -> None:
    """Nothing is written after it, and close says that the stream is not whole."""
    store = Store()
    store.fail_at = 14
    writer = FileWriter(store, buffer_bytes=1)
    writer.write(bytes(14))
    with pytest.raises(ChannelError, match="writing to the store: No space left on device"):
        writer.write(bytes(14))
    store.fail_at = None
    calls = len(store.calls)
    with pytest.raises(ChannelError, match="No space left"):
        writer.write(b"x")
    with pytest.raises(ChannelError, match="No space left"):
        writer.flush()
    assert len(store.calls) == calls
    assert isinstance(writer.error, ChannelError)
    assert writer.bytes_transferred == 14
    with pytest.raises(ChannelError, match="No space left"):
        writer.close()
    assert store.closed == 1
    writer.close()  # told once
    assert store.closed == 1


def test_an_error_set_from_outside_is_the_one_reported() -> None:
    """As a return path does that learns first."""
    writer = FileWriter(Store())
    writer.set_error(ChannelError("the other side said no"))
    writer.set_error(ChannelError("later"))
    with pytest.raises(ChannelError, match="said no"):
        writer.write(b"x")
    with pytest.raises(ChannelError, match="said no"):
        writer.close()


def test_a_stream_that_ends_too_early_has_a_place() -> None:
    """Position of the first byte that is missing; it sticks like any other error."""
    reader = FileReader(Store(b"0123456789"))
    assert reader.read(4) == b"0123"
    with pytest.raises(TruncatedStreamError, match="ends after 6") as caught:
        reader.read(7)
    assert caught.value.offset == 10
    with pytest.raises(TruncatedStreamError):
        reader.peek(1)


def test_a_failing_get_is_an_error_not_an_end() -> None:
    """A length that lies allocates nothing: bytes are kept only as they come."""

    def get(position: int, length: int) -> bytes:
        if position >= 8:
            raise TimeoutError("too slow")
        return b"x" * min(length, 8)

    reader = FileReader(ChannelOps(get_buffer=get, name="slow"))
    with pytest.raises(ChannelError, match="reading from slow: too slow"):
        reader.read(1 << 60)


def test_functions_that_lie_are_found_out() -> None:
    """None taken, more taken than given, more given than asked for."""
    for answer in (0, -1, 99):
        writer = FileWriter(ChannelOps(put_buffer=lambda data, position, n=answer: n))  # type: ignore[misc]
        writer.write(b"abc")
        with pytest.raises(ChannelError, match="took"):
            writer.flush()
    reader = FileReader(ChannelOps(get_buffer=lambda position, length: bytes(length + 1)))
    with pytest.raises(ChannelError, match="were asked for"):
        reader.read(1)


def test_seeking_leaves_holes_and_skips() -> None:
    """What positions are for: a file with pages at fixed places."""
    with tempfile.TemporaryFile() as file:
        writer = FileWriter(file)
        writer.write(b"head")
        writer.seek(1 << 20)
        writer.write(b"tail")
        writer.flush()
        file.seek(0)
        reader = FileReader(file)
        assert reader.read(4) == b"head"
        reader.seek(1 << 20)
        assert reader.position == 1 << 20
        assert reader.read(4) == b"tail"
        reader.seek((1 << 20) + 1)
        assert reader.read(3) == b"ail"


def test_files_of_all_kinds(tmp_path: Path) -> None:
    """Buffered, unbuffered, in memory; what stands in front of the position given over stays."""
    for buffering in (-1, 0):
        path = tmp_path / f"file{buffering}"
        path.write_bytes(b"prefix")
        with open(path, "ab", buffering=buffering) as file:
            writer = FileWriter(file)
            writer.write(b"stream")
            writer.close()
        assert path.read_bytes() == b"prefixstream"
        source = open(path, "rb", buffering=buffering)  # noqa: SIM115 - the reader closes it
        source.seek(6)
        reader = FileReader(source)
        assert reader.read(6) == b"stream"
        reader.close()
        assert source.closed
    memory = io.BytesIO()
    FileWriter(memory).flush()
    assert FileReader(b"abc").read(3) == b"abc"


def test_a_pipe_is_read_as_it_comes() -> None:
    """One that has a byte gives it, although more was asked for."""
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb") as reading, os.fdopen(write_fd, "wb", buffering=0) as writing:
        reader = FileReader(reading)
        writing.write(b"a")
        assert reader.read(1) == b"a"
        writer = FileWriter(writing)
        writer.write(b"bc")
        writer.flush()
        assert reader.read(2) == b"bc"
        writer.seek(100)
        writer.write(b"d")
        with pytest.raises(ChannelError, match="cannot be set"):
            writer.flush()


def test_a_forward_channel_gives_its_return_path() -> None:
    """A socket has one; three functions have one if they say so."""
    ours, theirs = socket.socketpair()
    with theirs:
        writer = FileWriter(ours)
        reader = writer.return_path()
        assert reader is not None
        writer.write(b"ping")
        writer.flush()
        assert theirs.recv(100) == b"ping"
        theirs.sendall(b"pong")
        assert reader.read(4) == b"pong"
        writer.close()
    assert FileWriter(Store()).return_path() is None
    back = Store(b"answer")
    forward = ChannelOps(
        get_buffer=Store(b"question").get_buffer, return_path=lambda: channel_ops(back)
    )
    answering = FileReader(forward).return_path()
    assert answering is not None
    answering.write(b"ANSWER")
    answering.flush()
    assert bytes(back.data) == b"ANSWER"


def test_what_is_no_channel_is_refused() -> None:
    """At once, by name."""
    with pytest.raises(TypeError, match="int can be no channel"):
        channel_ops(7)
    with pytest.raises(ValueError, match="cannot be written"):
        FileWriter(b"bytes")
    with pytest.raises(ValueError, match="cannot be read"):
        FileReader(ChannelOps(put_buffer=lambda data, position: None, name="sink"))
