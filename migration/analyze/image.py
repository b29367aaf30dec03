"""The content of RAM blocks, collected in sparse files: for ``--dump-ram`` and ``--diff``.

Files rather than memory: a guest may be larger than this machine. A page that was never sent
stays a hole and reads as zeros.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from .xbzrle import apply_xbzrle


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

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
