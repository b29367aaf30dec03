"""The table of outstanding faults, in C memory: who sleeps on which page, since when.

Written by native loops, read by the watchdog and by statistics, without locks and without the
interpreter. An entry is a hint: a page may be placed between the reading of its message and the
adding of its entry, so look at the page before acting on one.
"""

from dataclasses import dataclass
from typing import Any

from uffd._native import ffi, lib

_LIST_MAX = 512


@dataclass(frozen=True, slots=True)
class Outstanding:
    """One sleeper. ``thread_id`` is ``None`` without the THREAD_ID feature; ``since_ns`` is
    monotonic.
    """

    address: int
    thread_id: int | None
    since_ns: int


class PendingFaults:
    """512 slots; keep the object alive as long as native code uses :attr:`pointer`."""

    def __init__(self) -> None:
        #: ``struct pending_faults *`` for native code of this extension.
        self.pointer: Any = ffi.new("struct pending_faults *")
        lib.pending_init(self.pointer)

    @property
    def address(self) -> int:
        """The table as an integer address, for other extensions."""
        return int(ffi.cast("uintptr_t", self.pointer))

    def __len__(self) -> int:
        return int(self.pointer.count)

    @property
    def dropped(self) -> int:
        """Entries that found the table full."""
        return int(self.pointer.dropped)

    def add(self, address: int, thread_id: int = 0) -> bool:
        """False when the table is full. A thread waits for one page at a time: same id, same
        entry.
        """
        return lib.pending_add(self.pointer, address, thread_id) == 0

    def remove(self, address: int, length: int) -> int:
        """Forget every entry in the range; returns how many there were."""
        return lib.pending_remove_range(self.pointer, address, length)

    def oldest(self) -> Outstanding | None:
        entry = ffi.new("struct pending_entry *")
        return _outstanding(entry) if lib.pending_oldest(self.pointer, entry) else None

    def outstanding(self) -> list[Outstanding]:
        """All entries, longest wait first."""
        entries = ffi.new("struct pending_entry[]", _LIST_MAX)
        count = lib.pending_list(self.pointer, entries, _LIST_MAX)
        return sorted((_outstanding(entries[i]) for i in range(count)), key=lambda o: o.since_ns)


def _outstanding(entry: Any) -> Outstanding:
    return Outstanding(entry.address, entry.tid or None, entry.since_ns)
