"""What the kernel says about the mappings of a process: ``/proc/PID/smaps``.

Source: kernel ``Documentation/filesystems/proc.rst``.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_HEADER = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<permissions>\S+) (?P<offset>[0-9a-f]+) "
    r"(?P<device>\S+) (?P<inode>\d+) *(?P<name>.*)"
)


@dataclass(frozen=True)
class Section:
    """One mapping (VMA).

    :ivar permissions: ``rw-p`` and the like. :ivar name: file, ``[heap]``, ``[anon:...]``, or "".
    :ivar fields: the lines below it, by name, as text.
    """

    start: int
    end: int
    permissions: str
    offset: int
    inode: int
    name: str
    fields: dict[str, str] = field(default_factory=dict)

    def size(self, *names: str) -> int:
        """Bytes, of these fields together; one that this kernel does not have is 0."""
        return sum(int(self.fields.get(name, "0 kB").split()[0]) << 10 for name in names)

    @property
    def hugetlb(self) -> int:
        """Bytes of huge pages from a pool. They are not in ``Rss``."""
        return self.size("Shared_Hugetlb", "Private_Hugetlb")

    @property
    def vm_flags(self) -> frozenset[str]:
        """Two-letter codes: ``dc`` DONTFORK, ``dd`` DONTDUMP, ``hg``/``nh`` THP advice, ``ht``
        hugetlb, ``um``/``uw``/``ui`` userfaultfd missing, write-protect, minor.
        """
        return frozenset(self.fields.get("VmFlags", "").split())


def sections(pid: int | None = None) -> list[Section]:
    """All mappings of a process, by address. :param pid: ``None``: our own.

    :raises FileNotFoundError, ProcessLookupError: it is gone. :raises PermissionError: not allowed.
    """
    path = Path("/proc", "self" if pid is None else str(pid), "smaps")
    # A file may be called anything: only a newline ends a line, and the kernel escapes it in names.
    return list(parse(path.read_bytes().decode(errors="backslashreplace").split("\n")))


def section_at(address: int) -> Section:
    """The one of our mappings that holds ``address``. :raises LookupError: none does."""
    for section in sections():
        if section.start <= address < section.end:
            return section
    raise LookupError(f"no mapping at {address:#x}")


def parse(lines: Iterable[str]) -> Iterator[Section]:
    """The sections that these lines make."""
    section: Section | None = None
    for line in lines:
        if header := _HEADER.match(line):
            if section:
                yield section
            section = Section(
                start=int(header["start"], 16),
                end=int(header["end"], 16),
                permissions=header["permissions"],
                offset=int(header["offset"], 16),
                inode=int(header["inode"]),
                name=header["name"],
            )
        elif section:
            name, _, value = line.partition(":")
            section.fields[name] = value
    if section:
        yield section


@dataclass(frozen=True)
class MappingReport:
    """Sums over the mappings in a range. Lengths are in bytes.

    :ivar vm_flags: those that **every** mapping in the range has (see :class:`Section`).
    """

    vma_count: int
    size: int
    rss: int
    anon_huge_pages: int
    shmem_pmd_mapped: int
    hugetlb: int
    kernel_page_size: int
    vm_flags: frozenset[str]


def report(start: int, length: int) -> MappingReport:
    """Report on our mappings that overlap ``[start, start + length)``, whole ones counted."""
    found = [each for each in sections() if each.start < start + length and each.end > start]

    def total(name: str) -> int:
        return sum(each.size(name) for each in found)

    return MappingReport(
        vma_count=len(found),
        size=total("Size"),
        rss=total("Rss"),
        anon_huge_pages=total("AnonHugePages"),
        shmem_pmd_mapped=total("ShmemPmdMapped"),
        hugetlb=sum(each.hugetlb for each in found),
        kernel_page_size=min((each.size("KernelPageSize") for each in found), default=0),
        vm_flags=frozenset.intersection(*(each.vm_flags for each in found))
        if found
        else frozenset(),
    )
