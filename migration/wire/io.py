"""The two ends a codec works on. A channel implements them over a file descriptor, the classes here
over bytes in memory; the codecs never know which.
"""

from __future__ import annotations

from typing import Protocol

from .errors import TruncatedStreamError


class Reader(Protocol):
    """Bytes come in. Every length a caller passes must already have been checked against its
    bound."""

    @property
    def position(self) -> int:
        """Stream offset of the next byte."""
        ...

    def read(self, length: int) -> bytes:
        """Exactly ``length`` bytes; raises :class:`TruncatedStreamError` when the stream ends
        before."""
        ...

    def peek(self, length: int) -> bytes:
        """Up to ``length`` (at most 4096) of the next bytes, not consumed; shorter only at the
        end."""
        ...


class Writer(Protocol):
    """Bytes go out."""

    @property
    def position(self) -> int:
        """Stream offset of the next byte."""
        ...

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``; raises ``OSError`` when the channel is broken."""
        ...


class BytesReader:
    """A :class:`Reader` over bytes in memory. ``base`` is the stream offset of the first byte."""

    def __init__(
        self, data: bytes | memoryview, *, base: int = 0, section: str | None = None
    ) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._base = base
        self._section = section

    @property
    def position(self) -> int:
        return self._base + self._at

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def read(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise TruncatedStreamError(
                f"wanted {length} bytes, {self.remaining} left",
                offset=self.position,
                section=self._section,
            )
        data = bytes(self._data[self._at : end])
        self._at = end
        return data

    def peek(self, length: int) -> bytes:
        return bytes(self._data[self._at : self._at + length])


class BytesWriter:
    """A :class:`Writer` that keeps everything in memory."""

    def __init__(self, *, base: int = 0) -> None:
        self._data = bytearray()
        self._base = base

    @property
    def position(self) -> int:
        return self._base + len(self._data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._data += data

    def getvalue(self) -> bytes:
        """Everything written so far."""
        return bytes(self._data)
