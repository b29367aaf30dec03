"""Dirty tracking where the kernel sees only what vCPUs write: devices' own writes are added."""

from __future__ import annotations

from collections.abc import Mapping

from guestmem import Bitmap, DirtyTracker


class VmmAwareTracker:
    """A tracker plus bitmaps in which native device threads note pages they wrote, atomically and
    after the write. One thread at a time, like every tracker."""

    def __init__(self, inner: DirtyTracker, written: Mapping[str, Bitmap]) -> None:
        """:param written: by idstr, a bit per target page; emptied by each sync."""
        self._inner = inner
        self._written = written

    def start(self) -> None:
        """See :class:`guestmem.DirtyTracker`. Earlier notes are forgotten: the first pass sends
        everything anyway."""
        self._inner.start()
        for bitmap in self._written.values():
            Bitmap(bitmap.nbits).take(bitmap)

    def sync(self, into: dict[str, Bitmap]) -> int:
        """See :class:`guestmem.DirtyTracker`."""
        fresh = self._inner.sync(into)
        return fresh + sum(into[idstr].take(noted) for idstr, noted in self._written.items())

    def note_written(self, idstr: str, offset: int, length: int) -> None:
        """See :class:`guestmem.DirtyTracker`."""
        self._inner.note_written(idstr, offset, length)

    def stop(self) -> None:
        """See :class:`guestmem.DirtyTracker`."""
        self._inner.stop()
