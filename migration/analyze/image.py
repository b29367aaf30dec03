"""The content of RAM blocks, collected in sparse files: for ``--dump-ram`` and ``--diff``.

Files rather than memory: a guest may be larger than this machine. A page that was never sent
stays a hole and reads as zeros.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from .xbzrle import apply_xbzrle

_COMPARE_BYTES = 1 << 20


class BlockImage:
    """One RAM block's content in a sparse file.

    :param fd: open for reading and writing; owned by this object from now on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def set_length(self, length: int) -> None:
        """Give the file its length; what it holds beyond is cut off."""
        os.ftruncate(self._fd, length)

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Write page data at ``offset``."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view = view[done:]
            offset += done

    def apply(self, offset: int, delta: bytes, length: int) -> None:
        """Apply an XBZRLE delta to the page at ``offset``."""
        self.put(offset, apply_xbzrle(delta, self.get(offset, length)))

    def get(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; zeros past what was written."""
        parts = []
        left = length
        while left:
            data = os.pread(self._fd, left, offset)
            if not data:
                break
            parts.append(data)
            offset += len(data)
            left -= len(data)
        return b"".join(parts).ljust(length, b"\0")

    def next_data(self, offset: int, end: int) -> int:
        """Offset of the first byte at or after ``offset`` that is not in a hole, at most
        ``end``.
        """
        try:
            return min(os.lseek(self._fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return end
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Difference(NamedTuple):
    """A stretch of bytes that is not the same in two images; page granularity."""

    offset: int
    length: int


def compare_images(
    one: BlockImage, other: BlockImage, length: int, page_bytes: int
) -> Iterator[Difference]:
    """Runs of pages that differ within the first ``length`` bytes, in order.

    What is a hole in both files is passed over without reading.
    """
    run: Difference | None = None
    offset = 0
    while True:
        data_at = min(one.next_data(offset, length), other.next_data(offset, length))
        if data_at >= length:
            break
        offset = data_at - data_at % page_bytes
        size = min(_COMPARE_BYTES, length - offset)
        mine, theirs = one.get(offset, size), other.get(offset, size)
        if mine != theirs:
            for at in range(0, size, page_bytes):
                if mine[at : at + page_bytes] == theirs[at : at + page_bytes]:
                    continue
                page = min(page_bytes, size - at)
                if run is not None and run.offset + run.length == offset + at:
                    run = Difference(run.offset, run.length + page)
                else:
                    if run is not None:
                        yield run
                    run = Difference(offset + at, page)
        offset += size
    if run is not None:
        yield run
