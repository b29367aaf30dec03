"""The kinds of memory that checks try things on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from guestmem import smaps
from guestmem.geometry import THP_BYTES, align_up, format_size, size_option
from guestmem.pools import page_sizes
from uffd import Advice, Mapping, OutOfMemory, UffdError, file_system

from .attempt import Answer, base_page, is_thorough
from .row import Cause, Outcome, Tier, no, untested

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of memory.

    :ivar name: as in the rows' names: ``copy-shmem``.
    :ivar page_size: host page, bytes.
    :ivar since: release whose userfaultfd first took it.
    :ivar make: (length, reserve) to a fresh mapping, nothing of it present.
    """

    name: str
    title: str
    tier: Tier
    page_size: int
    since: str
    make: Callable[[int, bool], Mapping]
    is_shared: bool = False
    lock: str | None = None

    @property
    def is_hugetlb(self) -> bool:
        return self.name.startswith("hugetlb")

    @property
    def is_thp(self) -> bool:
        return self.name == "anon-thp"

    @property
    def is_disk_file(self) -> bool:
        return self.name == "file-private"

    @property
    def is_slow(self) -> bool:
        """To fill one page takes seconds, on a virtual machine that has never touched it before."""
        return self.page_size >= _GIB

    def map(self, *, reserve: bool = True, fill: bool | None = None) -> Mapping:
        """One host page; on THP one huge page's worth, aligned.

        :param reserve: hugetlb: take a page out of the pool now.
        :param fill: it will be filled, not only mapped; default: if it is reserved.
        :raises Answer: there is none to be had, or filling it is more than was asked for.
        """
        region = self.make(THP_BYTES if self.is_thp else self.page_size, reserve)
        if self.is_slow and (reserve if fill is None else fill) and not is_thorough():
            name = format_size(self.page_size)
            why = f"filling a page of {name} takes seconds, so it was not tried"
            raise Answer(untested(Cause.RESOURCE, why, "postcopy probe --thorough"))
        return region


def _anonymous(length: int, _: bool) -> Mapping:
    return Mapping.anonymous(length)


def _thp(length: int, _: bool) -> Mapping:
    room = Mapping.anonymous(length + THP_BYTES)
    start = align_up(room.address, THP_BYTES)
    region = Mapping(start, length, page_size=base_page(), fd=None, is_shared=False)
    try:
        region.advise(Advice.HUGEPAGE)
    except UffdError as error:
        raise Answer(
            no(
                Cause.KERNEL,
                f"transparent huge pages are not in this kernel ({error.strerror})",
                "a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y",
            )
        ) from None
    return region


def _shmem(length: int, _: bool) -> Mapping:
    return Mapping.memfd(length)


def _shmem_private(length: int, _: bool) -> Mapping:
    return Mapping.memfd(length, shared=False)


def _file_private(length: int, _: bool) -> Mapping:
    """A program on disk is a file that is surely there; a private mapping may be written."""
    for path in ("/proc/self/exe", sys.executable, __file__):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not file_system(fd).is_shmem:
            return Mapping.of_file(fd, length, shared=False)
        os.close(fd)
    raise Answer(untested(Cause.RESOURCE, "no file at hand that lies on a disk", None))


def _hugetlb(page_size: int, shared: bool) -> Callable[[int, bool], Mapping]:
    def make(length: int, reserve: bool) -> Mapping:
        try:
            return Mapping.memfd(length, hugepage_size=page_size, shared=shared, reserve=reserve)
        except OutOfMemory:
            raise Answer(no_free_page(page_size)) from None
        except UffdError as error:
            if error.errno != errno.ENODEV:
                raise
            raise Answer(no_pool(page_size)) from None

    return make


def no_free_page(page_size: int) -> Outcome:
    """The pool is empty, or all of it is promised to others."""
    why = f"no free page of {format_size(page_size)}"
    return untested(Cause.RESOURCE, why, fill_pool(page_size))


def fill_pool(page_size: int, node: int | None = None) -> str:
    """The command that sets more huge pages aside: 1 GiB worth, at least one page."""
    pages = max(1, _GIB // page_size)
    where = "" if node is None else f" --node {node}"
    return f"postcopy hugepages reserve {pages} --size {size_option(page_size)}{where} (as root)"


def no_pool(page_size: int) -> Outcome:
    """This kernel, or this processor, does not have pages of that size."""
    return no(
        Cause.KERNEL,
        f"no pool of {format_size(page_size)} pages",
        "CONFIG_HUGETLBFS=y" + (", and a processor with pdpe1gb" if page_size >= _GIB else ""),
    )


def is_huge(region: Mapping) -> bool:
    """The whole region is mapped by huge page table entries. Works on kernels of any age."""
    found = smaps.report(region.address, region.length)
    return found.anon_huge_pages + found.shmem_pmd_mapped >= region.length


ANON = Kind("anon", "anonymous", Tier.OPTIONAL, base_page(), "4.3", _anonymous)
ANON_THP = Kind("anon-thp", "anonymous, THP", Tier.OPTIONAL, base_page(), "4.3", _thp)
SHMEM = Kind("shmem", "shmem (memfd)", Tier.SHARED, base_page(), "4.11", _shmem, is_shared=True)
SHMEM_PRIVATE = Kind(
    "shmem-private", "shmem, private", Tier.SHARED, base_page(), "4.11", _shmem_private
)
FILE_PRIVATE = Kind(
    "file-private", "disk file, private", Tier.OPTIONAL, base_page(), "4.3", _file_private
)


def hugetlb_kinds() -> tuple[Kind, ...]:
    """2 MiB and 1 GiB pages always, so that their absence is a row too; then what else there is."""
    sizes = dict.fromkeys([THP_BYTES, _GIB, *(size for size in page_sizes() if size >= THP_BYTES)])
    found = []
    for size in sizes:
        shared = Kind(
            f"hugetlb-{size_option(size)}",
            f"hugetlb {size_option(size)}",
            Tier.HUGEPAGES,
            size,
            "4.11",
            _hugetlb(size, True),
            is_shared=True,
            lock=f"hugetlb-{size}",
        )
        private = replace(
            shared,
            name=shared.name + "-private",
            title=shared.title + ", private",
            make=_hugetlb(size, False),
            is_shared=False,
        )
        found += [shared, private]
    return tuple(found)


def all_kinds() -> tuple[Kind, ...]:
    """Every kind, in the order they are shown."""
    return (ANON, ANON_THP, SHMEM, SHMEM_PRIVATE, FILE_PRIVATE, *hugetlb_kinds())
