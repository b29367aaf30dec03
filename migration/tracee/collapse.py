"""Having the kernel gather a process's small pages into transparent huge ones."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from guestmem.geometry import THP_BYTES, align_down, align_up
from uffd import Advice, UffdError, pidfd_open, process_madvise

from .mappings import ProcessMapping, mappings
from .memory import populated


@dataclass(frozen=True, slots=True)
class Collapsed:
    """Bytes. :ivar tried: whole huge pages in which something is.
    :ivar before, after: of these in huge pages.
    """

    tried: int
    before: int
    after: int
    refused: tuple[tuple[int, str], ...]


def collapse(pid: int, ranges: list[tuple[int, int]]) -> Collapsed:
    """MADV_COLLAPSE (Linux 6.1) for ``(start, end)`` ranges of a process, which runs on meanwhile.

    A huge page that cannot be made (somebody shares it, no memory in one piece) leaves small ones.

    :raises TraceeGone: it ended. :raises TraceeError: it is somebody else's.
    """
    before = mappings(pid)
    pidfd = pidfd_open(pid)
    tried, refused = 0, []
    try:
        for start, end in ranges:
            for mapping, low, high in _whole(before, start, end):
                for offset, _ in populated(pid, low, high - low, unit=THP_BYTES):
                    tried += THP_BYTES
                    try:
                        process_madvise(pidfd, [(low + offset, THP_BYTES)], Advice.COLLAPSE)
                    except UffdError as error:
                        refused.append((low + offset, _why(mapping, error)))
    finally:
        os.close(pidfd)
    return Collapsed(tried, _huge(before, ranges), _huge(mappings(pid), ranges), tuple(refused))


def _why(mapping: ProcessMapping, error: UffdError) -> str:
    if error.errno == errno.EINVAL and "nh" in mapping.flags:
        return "the process wants small pages there (MADV_NOHUGEPAGE)"
    return os.strerror(error.errno or 0)


def _whole(
    maps: list[ProcessMapping], start: int, end: int
) -> list[tuple[ProcessMapping, int, int]]:
    """The parts of a range that could be huge pages, and the mappings that they are parts of."""
    found = []
    for mapping in maps:
        low = align_up(max(start, mapping.start), THP_BYTES)
        high = align_down(min(end, mapping.end), THP_BYTES)
        if low < high and mapping.rss and mapping.is_private_anonymous:
            found.append((mapping, low, high))
    return found


def _huge(maps: list[ProcessMapping], ranges: list[tuple[int, int]]) -> int:
    return sum(
        m.huge for m in maps if any(m.start < end and start < m.end for start, end in ranges)
    )
