"""Folio sizes: letting the kernel allocate them where advised, seeing which one a page is in."""

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from guestmem import smaps
from scripts.validate.kinds import HUGE, PAGE
from uffd import Pagemap

_THP = Path("/sys/kernel/mm/transparent_hugepage")
_KPAGEFLAGS = "/proc/kpageflags"
_HEAD, _TAIL = 15, 16


@contextlib.contextmanager
def _switched(path: Path, value: str) -> Iterator[None]:
    before = re.search(r"\[(.+)\]", path.read_text())
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before[1] if before else "never")


@contextlib.contextmanager
def allowed(size: int, *, of_file: bool = False) -> Iterator[None]:
    """Folios of ``size`` where MADV_HUGEPAGE was given, for the whole machine, for a while.

    :raises OSError: this kernel cannot, or we must not.
    """
    directory = _THP / f"hugepages-{size >> 10}kB"
    name, advised = ("shmem_enabled", "advise") if of_file else ("enabled", "madvise")
    path = directory / name
    if not path.exists():
        path, text = _THP / name, (_THP / name).read_text()
        if size != HUGE:
            raise FileNotFoundError(f"{directory} is not there (Linux 6.8 for anonymous memory)")
        if f"[{advised}]" in text or "[always]" in text:
            yield
            return
    with _switched(path, advised):
        yield


def folio_bytes(address: int) -> int:
    """The size of the folio behind ``address``, which must be its first page; 0 if absent.

    Needs root: frame numbers are hidden from others. Source: ``Documentation/admin-guide/mm/
    pagemap.rst``.
    """
    with Pagemap() as pagemap:
        frame = pagemap.entries(address, 1)[0].frame_number
    if not frame:
        return 0
    fd = os.open(_KPAGEFLAGS, os.O_RDONLY)
    try:
        words = os.pread(fd, 8 * (HUGE // PAGE), 8 * frame)
    finally:
        os.close(fd)
    flags = [word for (word,) in struct.iter_unpack("<Q", words)]
    if not flags[0] >> _HEAD & 1:
        return PAGE
    count = 1
    while count < len(flags) and flags[count] >> _TAIL & 1:
        count += 1
    return count * PAGE


def anon_huge_bytes(address: int) -> int:
    """How much of the mapping around ``address`` is mapped by whole anonymous huge pages."""
    return smaps_field(address, "AnonHugePages")


def smaps_field(address: int, name: str) -> int:
    """One field of the mapping that holds ``address``, bytes."""
    section = smaps.section_at(address)
    if name not in section.fields:
        raise LookupError(f"no field {name} of the mapping at {address:#x}")
    return section.size(name)


def vm_flags(address: int) -> frozenset[str]:
    """The two-letter flags of the mapping that holds ``address``."""
    return smaps.section_at(address).vm_flags
