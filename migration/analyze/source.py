"""Where the analyser's bytes come from: a buffered reader over any file, with look-ahead.

A :class:`Source` is a ``wire`` Reader with three things more: it looks ahead as far as asked (to
find where a section of unknown length ends), it can be held inside the length of a package, and it
can take off the checksum frames two of our own ends may have put on. Its position is always an
offset in the file (after decompression), so that an error can be looked up with any hex viewer.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import sys
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self, cast

from migration.native import crc32c
from migration.wire.errors import RemoteStreamError, TruncatedStreamError
from migration.wire.extension import FRAME_HEADER_BYTES, FRAME_PAYLOAD_MAX

_CHUNK_BYTES = 1 << 20
_FRAMES_REMEMBERED = 4 << 10
_COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\xfd7zXZ\0": lzma.open,
    b"\x1f\x8b\x08": gzip.open,
    b"BZh": bz2.open,
}
_DAMAGED = (lzma.LZMAError, zlib.error, EOFError, OSError)
"""gzip and bz2 raise OSError for wrong data too; what really came from the system has an errno."""


class _Bytes(Protocol):
    def read(self, length: int, /) -> bytes: ...


class Source:
    """A Reader over a file.

    :param owned: closed together with this object.
    :ivar name: the file's name, for people.
    :ivar section: what is being read now; goes into the error of a stream that ends too early.
    """

    def __init__(self, raw: BinaryIO, name: str = "-", *, owned: ExitStack | None = None) -> None:
        self.name = name
        self._owned = owned or ExitStack()
        self.section: str | None = None
        self._raw: _Bytes = raw
        self._seekable = raw if _is_plain_file(raw) else None
        self._data = b""
        self._at = 0
        self._base = 0
        self._limit: int | None = None
        self._frames: _Frames | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that were opened for this source."""
        self._owned.close()

    @property
    def position(self) -> int:
        """File offset of the next byte."""
        consumed = self._base + self._at
        return consumed if self._frames is None else self._frames.file_offset(consumed)

    @property
    def consumed(self) -> int:
        """Bytes of stream handed out so far; differs from the position once frames are on."""
        return self._base + self._at

    @property
    def remaining_in_package(self) -> int | None:
        """Bytes up to the end of the package that is being read, or None outside of one."""
        return None if self._limit is None else self._limit - self.consumed

    def read(self, length: int) -> bytes:
        """Exactly ``length`` bytes.

        :raises TruncatedStreamError: the file or the package ends before; nothing is consumed.
        """
        end = self._at + length
        if end > len(self._data) or self._limit is not None:
            self._require(length)
            end = self._at + length
        data = self._data[self._at : end]
        self._at = end
        return data

    def peek(self, length: int) -> bytes:
        """Up to ``length`` of the next bytes, not consumed; shorter only at the end."""
        if self._limit is not None:
            length = min(length, self._limit - self.consumed)
        self._fill(length)
        return self._data[self._at : self._at + length]

    def skip(self, length: int) -> None:
        """Pass over ``length`` bytes without keeping them; a plain file is seeked."""
        self._within_limit(length)
        left = length - (len(self._data) - self._at)
        if left <= 0:
            self._at += length
            return
        if self._seekable is not None and left > _CHUNK_BYTES and self._seek(left):
            return
        while length:
            step = min(length, _CHUNK_BYTES)
            self._require(step)
            self._at += step
            length -= step

    def at_end(self) -> bool:
        """True when no byte is left (of the package, inside of one)."""
        return not self.peek(1)

    def drain(self) -> int:
        """Read to the end of the file; returns how many bytes that were."""
        count = 0
        while data := self.peek(_CHUNK_BYTES):
            self._at += len(data)
            count += len(data)
        return count

    @contextmanager
    def package(self, length: int) -> Iterator[None]:
        """Within this context the stream ends after ``length`` bytes."""
        self._limit = self.consumed + length
        try:
            yield
        finally:
            self._limit = None

    def start_frames(self) -> None:
        """From the next byte on the file is a sequence of checksum frames (see ``wire.extension``).

        Errors in a frame are raised by whichever read gets to it.
        """
        ahead = self._data[self._at :]
        self._frames = _Frames(_Chain(ahead, self._raw), self._base + self._at)
        self._raw = self._frames
        self._base += self._at
        self._data, self._at = b"", 0
        self._seekable = None

    def starts_with_frame(self) -> bool:
        """True when the next bytes are a whole frame, number 0, with the right checksum."""
        head = self.peek(FRAME_HEADER_BYTES)
        length = int.from_bytes(head[:4], "big")
        if len(head) < FRAME_HEADER_BYTES or not 1 <= length <= FRAME_PAYLOAD_MAX:
            return False
        frame = self.peek(FRAME_HEADER_BYTES + length)
        if len(frame) < FRAME_HEADER_BYTES + length:
            return False
        return _frame_checksum(0, frame[8:]) == int.from_bytes(frame[4:8], "big")

    def _fill(self, length: int) -> None:
        have = len(self._data) - self._at
        if have >= length:
            return
        parts = [self._data[self._at :]]
        self._base += self._at
        self._at = 0
        try:
            while have < length:
                # Never ask for the whole length at once: a BufferedReader allocates what it is
                # asked for, and the length may be a lie.
                more = self._raw.read(_CHUNK_BYTES)
                if not more:
                    break
                parts.append(more)
                have += len(more)
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._data = b"".join(parts)
            raise RemoteStreamError(
                f"the compressed file is damaged: {error}",
                offset=self._base + have,
                section=self.section,
            ) from None
        finally:
            self._data = b"".join(parts)

    def _require(self, length: int) -> None:
        self._within_limit(length)
        self._fill(length)
        if len(self._data) - self._at < length:
            left = len(self._data) - self._at
            raise TruncatedStreamError(
                f"the file ends: {length} bytes wanted, {left} left",
                offset=self.position,
                section=self.section,
            )

    def _within_limit(self, length: int) -> None:
        if self._limit is not None and self.consumed + length > self._limit:
            raise RemoteStreamError(
                f"the package ends: {length} bytes wanted, {self._limit - self.consumed} left",
                offset=self.position,
                section=self.section,
            )

    def _seek(self, left: int) -> bool:
        assert self._seekable is not None
        here = self._seekable.tell()
        if here + left > os.fstat(self._seekable.fileno()).st_size:
            return False  # read to the end instead, so that the error says how much was left
        self._seekable.seek(here + left)
        self._base += len(self._data) + left
        self._data, self._at = b"", 0
        return True


class _Chain:
    """Bytes already read, then the rest of the file."""

    def __init__(self, ahead: bytes, rest: _Bytes) -> None:
        self._ahead = ahead
        self._rest = rest

    def read(self, length: int, /) -> bytes:
        if self._ahead:
            data, self._ahead = self._ahead[:length], self._ahead[length:]
            return data
        return self._rest.read(length)

    def read_exactly(self, length: int) -> bytes:
        parts = b""
        while len(parts) < length:
            more = self.read(length - len(parts))
            if not more:
                break
            parts += more
        return parts


class _Frames:
    """Takes the checksum frames off. One call, one frame's payload."""

    def __init__(self, raw: _Chain, start: int) -> None:
        self._raw = raw
        self._sequence = 0
        self._file_at = start
        self._stream_at = start
        self._stream_starts: list[int] = []
        self._file_starts: list[int] = []

    def read(self, length: int, /) -> bytes:
        header = self._raw.read_exactly(FRAME_HEADER_BYTES)
        if not header:
            return b""
        size = int.from_bytes(header[:4], "big")
        if len(header) < FRAME_HEADER_BYTES:
            raise self._bad("the file ends inside a frame header", truncated=True)
        if not 1 <= size <= FRAME_PAYLOAD_MAX:
            raise self._bad(f"a frame of {size} bytes")
        payload = self._raw.read_exactly(size)
        if len(payload) < size:
            raise self._bad(
                f"the file ends inside a frame of {size} bytes, {len(payload)} are there",
                truncated=True,
            )
        if _frame_checksum(self._sequence, payload) != int.from_bytes(header[4:], "big"):
            raise self._bad("wrong checksum")
        self._sequence += 1
        self._remember()
        self._file_at += FRAME_HEADER_BYTES + size
        self._stream_at += size
        return payload

    def file_offset(self, consumed: int) -> int:
        """File offset of byte ``consumed`` of the stream; exact for the bytes still buffered."""
        index = bisect_right(self._stream_starts, consumed) - 1
        if index < 0:
            return self._file_at
        return self._file_starts[index] + consumed - self._stream_starts[index]

    def _remember(self) -> None:
        # Look-ahead seldom spans many frames; forget the oldest so that a long stream stays small.
        if len(self._stream_starts) > 2 * _FRAMES_REMEMBERED:
            del self._stream_starts[:_FRAMES_REMEMBERED]
            del self._file_starts[:_FRAMES_REMEMBERED]
        self._stream_starts.append(self._stream_at)
        self._file_starts.append(self._file_at + FRAME_HEADER_BYTES)

    def _bad(self, reason: str, *, truncated: bool = False) -> RemoteStreamError:
        kind = TruncatedStreamError if truncated else RemoteStreamError
        return kind(reason, offset=self._file_at, section=f"frame {self._sequence}")


def open_source(path: str) -> Source:
    """Open a stream for analysis; ``-`` is standard input; ``.xz``, ``.gz`` and ``.bz2`` are
    unpacked.

    :raises OSError: the file cannot be opened or read.
    """
    if path == "-":
        return _unpacked(sys.stdin.buffer, path, ExitStack())
    with ExitStack() as stack:
        raw = stack.enter_context(open(path, "rb"))
        return _unpacked(raw, path, stack.pop_all())


def _unpacked(raw: BinaryIO, path: str, owned: ExitStack) -> Source:
    buffered = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast(Any, raw))
    head = buffered.peek(8)
    for magic, unpack in _COMPRESSED.items():
        if head.startswith(magic):
            return Source(owned.enter_context(unpack(buffered)), path, owned=owned)
    return Source(cast(BinaryIO, buffered), path, owned=owned)


def _frame_checksum(sequence: int, payload: bytes) -> int:
    head = sequence.to_bytes(8, "big") + len(payload).to_bytes(4, "big")
    return crc32c(payload, crc32c(head))


def _is_plain_file(raw: BinaryIO) -> bool:
    if not isinstance(raw, io.BufferedReader):
        return False
    try:
        return stat.S_ISREG(os.fstat(raw.fileno()).st_mode)
    except OSError:
        return False
