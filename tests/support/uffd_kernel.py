"""What an older kernel lacks, found out by trying it, never by its version; tests are then skipped.

Releases are named for people only.
"""

from __future__ import annotations

import errno
import functools
import os

from tests.support.need import need
from tests.support.uffd_memory import HUGE, PAGE, hugepages, need_feature, open_uffd
from uffd import (
    Advice,
    Feature,
    InvalidRequest,
    Mapping,
    Mode,
    Pagemap,
    UffdError,
    Userfaultfd,
    Way,
)


def need_way(way: Way) -> None:
    """A userfaultfd can be had so."""
    if way is Way.DEVICE:
        there = os.path.exists(way.value)
        need(there, "this kernel has no /dev/userfaultfd (Linux 6.1)")


def need_user_mode_only() -> None:
    """The kernel knows contexts that trap user-mode faults only."""
    try:
        Userfaultfd.open(user_mode_only=True).close()
    except UffdError as error:
        unknown = error.errno == errno.EINVAL
        need(not unknown, "this kernel does not know UFFD_USER_MODE_ONLY (Linux 5.11)")
        raise


def need_modes(region: Mapping, mode: Mode) -> None:
    """Memory like ``region`` can be registered so."""
    if region.fd is None:
        return
    if Mode.WP in mode:
        need_feature(Feature.WP_HUGETLBFS_SHMEM)
    if Mode.MINOR in mode:
        is_huge = region.page_size == HUGE
        need_feature(Feature.MINOR_HUGETLBFS if is_huge else Feature.MINOR_SHMEM)


def need_dontneed(region: Mapping) -> None:
    """DONTNEED drops pages of memory like ``region``."""
    need(region.page_size != HUGE or _drops_huge_pages(), _NO_DONTNEED)


def need_remap(region: Mapping) -> None:
    """mremap moves memory like ``region``."""
    need(region.page_size != HUGE or _moves_huge_pages(), _NO_REMAP)


def need_marks() -> None:
    """``/proc/PID/pagemap`` shows which pages are write-protected."""
    need(_shows_marks(), "this kernel's pagemap shows no write-protect marks (Linux 5.14)")


_NO_DONTNEED = "this kernel's DONTNEED refuses huge pages (Linux 5.18)"
_NO_REMAP = "this kernel's mremap refuses huge pages (Linux 5.16)"


@functools.cache
def _drops_huge_pages() -> bool:
    with hugepages(1), Mapping.memfd(HUGE, hugepage_size=HUGE) as scratch:
        try:
            scratch.advise(Advice.DONTNEED)
        except InvalidRequest:
            return False
    return True


@functools.cache
def _shows_marks() -> bool:
    with Mapping.anonymous(PAGE) as page, open_uffd() as uffd, Pagemap() as pagemap:
        page.store(0, 1)
        uffd.register(page, Mode.WP)
        uffd.write_protect(page)
        return pagemap.entries(page.address, 1)[0].is_write_protected


@functools.cache
def _moves_huge_pages() -> bool:
    with hugepages(1), Mapping.memfd(HUGE, hugepage_size=HUGE) as scratch:
        try:
            scratch.remap().close()
        except (UffdError, OSError):
            return False
    return True
