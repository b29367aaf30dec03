"""What the kernel says about a stretch of our address space: ``/proc/self/smaps``."""

import re
from dataclasses import dataclass
from pathlib import Path

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ [0-9a-f]+ \S+ \d+")


@dataclass(frozen=True)
class MappingReport:
    """Sums over the mappings (VMAs) in a range. Lengths are in bytes.

    :ivar vm_flags: two-letter codes each with all mappings' agreement: a code is listed if
        **every** mapping in the range has it (``dc`` DONTFORK, ``dd`` DONTDUMP, ``hg``/``nh`` THP
        advice, ``ht`` hugetlb, ``um``/``uw``/``ui`` userfaultfd missing, write-protect, minor).
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
    """Report on the mappings that overlap ``[start, start + length)``, whole ones counted."""
    sections = _sections(start, start + length)
    flags = [frozenset(str(section.get("VmFlags", "")).split()) for section in sections]
    return MappingReport(
        vma_count=len(sections),
        size=_total(sections, "Size"),
        rss=_total(sections, "Rss"),
        anon_huge_pages=_total(sections, "AnonHugePages"),
        shmem_pmd_mapped=_total(sections, "ShmemPmdMapped"),
        hugetlb=_total(sections, "Shared_Hugetlb") + _total(sections, "Private_Hugetlb"),
        kernel_page_size=min((_kib(section, "KernelPageSize") for section in sections), default=0),
        vm_flags=frozenset.intersection(*flags) if flags else frozenset(),
    )


def _sections(start: int, end: int) -> list[dict[str, str]]:
    sections: list[dict[str, str]] = []
    wanted = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := _HEADER.match(line):
            wanted = int(header[1], 16) < end and int(header[2], 16) > start
            if wanted:
                sections.append({})
        elif wanted:
            name, _, value = line.partition(":")
            sections[-1][name] = value
    return sections


def _kib(section: dict[str, str], field: str) -> int:
    return int(section.get(field, "0 kB").split()[0]) << 10


def _total(sections: list[dict[str, str]], field: str) -> int:
    return sum(_kib(section, field) for section in sections)
