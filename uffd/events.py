"""Messages of a userfaultfd as a sum of frozen dataclasses, and their decoding.

Order: the kernel hands out faults before events when both wait, so a fault may be read before the
REMOVE or UNMAP that logically came first. Whoever keeps page state drains the fd, applies the
events, then answers the faults. The same fault may be reported more than once (two threads, a
spurious wake, a signal handler in the waiting thread): de-duplicate by page.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from uffd.flags import FaultFlag

if TYPE_CHECKING:
    from uffd.fd import Userfaultfd

MESSAGE_BYTES = 32

_HEAD = struct.Struct("<B7x")
_FAULT = struct.Struct("<QQI4x")
_THREE = struct.Struct("<QQQ")

_PAGEFAULT, _FORK, _REMAP, _REMOVE, _UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread sleeps on ``address`` until the page is placed or the range is woken.

    ``address`` is rounded down to 4 KiB (hugetlb: to the huge page) unless the context has
    EXACT_ADDRESS. ``thread_id`` is ``None`` without THREAD_ID; it is the id the thread itself
    sees, in its own pid namespace.
    """

    address: int
    flags: FaultFlag
    thread_id: int | None

    @property
    def is_write(self) -> bool:
        return FaultFlag.WRITE in self.flags

    @property
    def is_write_protect(self) -> bool:
        return FaultFlag.WP in self.flags

    @property
    def is_minor(self) -> bool:
        """The page cache has the page, the page table does not: answer with CONTINUE."""
        return FaultFlag.MINOR in self.flags

    @property
    def is_read_write_protect(self) -> bool:
        return FaultFlag.RWP in self.flags

    @property
    def is_missing(self) -> bool:
        return not self.flags & (FaultFlag.WP | FaultFlag.MINOR | FaultFlag.RWP)


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked. ``child`` is the child's own context, open in this process, same
    features.

    fork(2) sleeps until the message is read, and ``os.fork`` does so with the interpreter lock
    held: a process that forks itself needs a native reader (:class:`uffd.handler.FaultHandler`).

    It is the receiver's to close; closing it lets the child's missing pages read as zeros.
    """

    child: "Userfaultfd"


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap moved a registered range. An :class:`Unmap` of the old range follows: part of the
    move.
    """

    source: int
    destination: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """madvise is about to empty [start, end). The registration stays; pages come back as zeros."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Unmap:
    """[start, end) is no longer mapped."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """A message this version has no name for; ``payload`` is its last 24 bytes."""

    event: int
    payload: bytes


Event: TypeAlias = PageFault | Fork | Remap | Remove | Unmap | UnknownEvent


def decode_message(
    message: bytes, *, has_thread_id: bool, adopt: Callable[[int], "Userfaultfd"]
) -> Event:
    """Decode one 32-byte message.

    :param has_thread_id: whether the context was opened with THREAD_ID; without it the field is 0.
    :param adopt: turns the fd number of a FORK message into the child's object.
    """
    (event,) = _HEAD.unpack_from(message)
    body = message[_HEAD.size :]
    if event == _PAGEFAULT:
        flags, address, thread_id = _FAULT.unpack(body)
        return PageFault(address, FaultFlag(flags), thread_id if has_thread_id else None)
    first, second, third = _THREE.unpack(body)
    if event == _FORK:
        return Fork(adopt(first & 0xFFFFFFFF))
    if event == _REMAP:
        return Remap(first, second, third)
    if event == _REMOVE:
        return Remove(first, second)
    if event == _UNMAP:
        return Unmap(first, second)
    return UnknownEvent(event, body)
