"""What can go wrong with guest memory, one type for each thing a caller treats differently.

Arguments out of bounds are ``ValueError`` and name the block and the offset; everything the
kernel refuses is a :class:`GuestMemoryError` with its errno.
"""

import errno
import os

from guestmem.geometry import format_size, size_option


class GuestMemoryError(OSError):
    """The kernel refused something about guest memory. ``remedy`` says what to try, if known."""

    def __init__(self, errno_: int, message: str, *, remedy: str | None = None) -> None:
        super().__init__(errno_, message)
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.strerror}: {os.strerror(self.errno or 0)}"
        return f"{text}. Remedy: {self.remedy}" if self.remedy else text


class HugepagesShort(GuestMemoryError):
    """The pool, the nodes asked for, or a cgroup has fewer huge pages than a block needs.

    :ivar page_size: bytes of one huge page. :ivar pages_needed: asked for.
    :ivar pages_free: free and not reserved by others when looked at, just after the refusal.
    :ivar nodes: the NUMA nodes they had to come from; empty: any.
    """

    def __init__(
        self,
        what: str,
        *,
        page_size: int,
        pages_needed: int,
        pages_free: int,
        nodes: tuple[int, ...] = (),
        surplus_room: int = 0,
        reason: str | None = None,
        remedy: str | None = None,
    ) -> None:
        """:param surplus_room: pages the kernel may still make beyond the pool (overcommit).
        :param reason, remedy: instead of the pool's own, when something else is the limit.
        """
        self.page_size = page_size
        self.pages_needed = pages_needed
        self.pages_free = pages_free
        self.nodes = nodes
        size = size_option(page_size)
        missing = max(1, pages_needed - pages_free - surplus_room)
        where = f" on node {' and '.join(map(str, nodes))}" if nodes else ""
        plural = "s" if pages_needed != 1 else ""
        text = f"{what} needs {pages_needed} huge page{plural} of {format_size(page_size)}{where}, "
        text += f"{pages_free} are free"
        if surplus_room:
            text += f" and {surplus_room} more may be made (surplus)"
        if reason:
            text += f": {reason}"
        node = f" --node {nodes[0]}" if nodes else ""
        super().__init__(
            errno.ENOMEM,
            text,
            remedy=remedy or f"postcopy hugepages reserve {missing} --size {size}{node}",
        )


class PageSizeMismatch(GuestMemoryError):
    """Huge pages were asked for, and the file would silently have given pages of another size."""

    def __init__(self, what: str, *, wanted: int, found: int) -> None:
        self.wanted = wanted
        self.found = found
        super().__init__(
            errno.EINVAL,
            f"{what} has pages of {format_size(found)}, not the {format_size(wanted)} asked for",
            remedy=f"mount -t hugetlbfs -o pagesize={size_option(wanted)} none DIRECTORY, "
            "and use a path there",
        )


class GuestMemoryLost(GuestMemoryError):
    """A touch of a page that nobody will ever provide; without this it would be a SIGBUS.

    It was poisoned because its migration was given up, or the kernel has nothing to back it with:
    no huge page left in the pool, a file system that is full, a file cut short. The signal does not
    tell which: its code does so only on kernels built to handle memory failures.

    :ivar idstr: the block. :ivar offset: bytes from its start, where the touch stopped.
    """

    def __init__(self, idstr: str, offset: int, doing: str) -> None:
        self.idstr = idstr
        self.offset = offset
        super().__init__(
            errno.EFAULT,
            f"{doing} block {idstr!r} at offset {offset:#x}: the page will never come; its "
            "migration was given up, or the pool or file behind it is exhausted",
        )

    def __str__(self) -> str:
        return str(self.strerror)


class DirtyTrackingError(GuestMemoryError):
    """Dirty tracking could not start, or the kernel stopped answering it."""


class TrackingBusy(DirtyTrackingError):
    """Another userfaultfd still holds the range: one context per range at a time."""


def check(result: int, what: str) -> int:
    """Return ``result`` if it is a count; raise what the negative errno stands for.

    :raises GuestMemoryError: ``result`` is a negative errno; ``what`` names operation and block.
    """
    if result >= 0:
        return result
    raise GuestMemoryError(-result, what)
