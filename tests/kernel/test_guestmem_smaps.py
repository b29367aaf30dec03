"""smaps as the kernel writes it, of our own mappings and of ones with awkward names."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from guestmem import smaps
from migration.tracee.mappings import mappings
from tests.support.uffd_memory import PAGE

pytestmark = pytest.mark.kernel

NAMES = [
    b"plain",
    b"two words",
    b"not\xfftext",
    b"a\rb\x0cRss: 9 kB",
    b"line\nRss: 9 kB",
    b"(deleted)",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_may_be_called_anything(tmp_path: Path, name: bytes) -> None:
    """It spoils neither its own section nor the ones after it."""
    path = os.path.join(bytes(tmp_path), name)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, PAGE)
    with mmap.mmap(fd, PAGE) as area:
        os.close(fd)
        area[0] = 1
        found = [each for each in smaps.sections() if each.name.startswith(str(tmp_path))]
        (section,) = found
        assert section.size("Rss") == PAGE
        assert section.permissions == "rw-s"
        assert section.inode == os.stat(path).st_ino
        (seen,) = [each for each in mappings(os.getpid()) if each.name == section.name]
        assert (seen.start, seen.end, seen.rss) == (section.start, section.end, PAGE)
        section.name.encode()  # can be printed
        assert smaps.section_at(seen.start).name == section.name


def test_no_mapping_there() -> None:
    with pytest.raises(LookupError, match="no mapping at 0x0"):
        smaps.section_at(0)


def test_a_field_that_this_kernel_does_not_have() -> None:
    lines = [
        "7f0000000000-7f0000002000 r--p 00001000 08:01 77 /a: b",
        "Size:                  8 kB",
        "VmFlags: rd mr um ",
        "7f0000002000-7f0000003000 ---p 00000000 00:00 0 ",
    ]
    first, second = smaps.parse(lines)
    assert (first.name, first.offset, first.inode) == ("/a: b", 0x1000, 77)
    assert (first.size("Size"), first.size("Size", "Swap"), first.hugetlb) == (8192, 8192, 0)
    assert first.vm_flags == {"rd", "mr", "um"}
    assert (second.name, second.vm_flags, second.size("Size")) == ("", frozenset(), 0)
