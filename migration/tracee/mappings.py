"""The mappings of another process, as ``/proc/PID/smaps`` tells them."""

from __future__ import annotations

from dataclasses import dataclass

from guestmem import smaps

from .errors import TraceeError, TraceeGone

_UFFD_FLAGS = {"um": "missing", "uw": "write-protect", "ui": "minor"}


@dataclass(frozen=True, slots=True)
class ProcessMapping:
    """One mapping. Addresses are that process's; lengths are in bytes.

    :ivar permissions: as in maps: ``rw-p``. :ivar name: file, ``[heap]``, ``[anon:...]``, or "".
    :ivar page_size: of the pages it is made of (``KernelPageSize``).
    :ivar rss: bytes in memory. :ivar huge: of these in huge pages of any kind.
    :ivar flags: the two-letter codes of ``VmFlags``.
    """

    start: int
    end: int
    permissions: str
    offset: int
    inode: int
    name: str
    page_size: int
    rss: int
    swap: int
    huge: int
    flags: frozenset[str]

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def is_hugetlb(self) -> bool:
        """Made of pages from a pool."""
        return "ht" in self.flags

    @property
    def is_private_anonymous(self) -> bool:
        """Nobody else's, and no file behind it: contents are all that it is."""
        return self.permissions.endswith("p") and self.inode == 0 and not self.is_hugetlb

    @property
    def uffd_modes(self) -> tuple[str, ...]:
        """What a userfaultfd is registered for here."""
        return tuple(name for flag, name in _UFFD_FLAGS.items() if flag in self.flags)


def mappings(pid: int) -> list[ProcessMapping]:
    """All of them, by address.

    :raises TraceeGone: no such process. :raises TraceeError: not allowed.
    """
    try:
        return [_mapping(section) for section in smaps.sections(pid)]
    except (FileNotFoundError, ProcessLookupError):
        raise TraceeGone(f"there is no process {pid}") from None
    except PermissionError:
        raise TraceeError(
            f"process {pid} is somebody else's", hint="run as root, or as its owner"
        ) from None


def _mapping(section: smaps.Section) -> ProcessMapping:
    transparent = section.size("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")
    return ProcessMapping(
        start=section.start,
        end=section.end,
        permissions=section.permissions,
        offset=section.offset,
        inode=section.inode,
        name=section.name,
        page_size=section.size("KernelPageSize"),
        rss=section.size("Rss") + section.hugetlb,
        swap=section.size("Swap"),
        huge=section.hugetlb + transparent,
        flags=section.vm_flags,
    )
