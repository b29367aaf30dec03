"""The mappings of another process, as ``/proc/PID/smaps`` tells them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import TraceeError, TraceeGone

_HEADER = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<permissions>\S+) (?P<offset>[0-9a-f]+) "
    r"(?P<device>\S+) (?P<inode>\d+) *(?P<name>.*)"
)
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
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        raise TraceeGone(f"there is no process {pid}") from None
    except PermissionError:
        raise TraceeError(
            f"process {pid} is somebody else's", hint="run as root, or as its owner"
        ) from None
    found: list[ProcessMapping] = []
    header: re.Match[str] | None = None
    fields: dict[str, str] = {}
    for line in lines:
        if match := _HEADER.match(line):
            if header:
                found.append(_mapping(header, fields))
            header, fields = match, {}
        else:
            name, _, value = line.partition(":")
            fields[name] = value
    if header:
        found.append(_mapping(header, fields))
    return found


def _mapping(header: re.Match[str], fields: dict[str, str]) -> ProcessMapping:
    hugetlb = _bytes(fields, "Private_Hugetlb") + _bytes(fields, "Shared_Hugetlb")
    transparent = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")
    return ProcessMapping(
        start=int(header["start"], 16),
        end=int(header["end"], 16),
        permissions=header["permissions"],
        offset=int(header["offset"], 16),
        inode=int(header["inode"]),
        name=header["name"],
        page_size=_bytes(fields, "KernelPageSize"),
        rss=_bytes(fields, "Rss") + hugetlb,
        swap=_bytes(fields, "Swap"),
        huge=hugetlb + sum(_bytes(fields, name) for name in transparent),
        flags=frozenset(fields.get("VmFlags", "").split()),
    )


def _bytes(fields: dict[str, str], name: str) -> int:
    return int(fields.get(name, "0 kB").split()[0]) << 10
