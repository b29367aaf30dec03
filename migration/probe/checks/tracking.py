"""Knowing what was written (a source's need), throwing away what turned stale (a destination's)."""

from __future__ import annotations

from functools import partial

from uffd import (
    Advice,
    Category,
    Feature,
    FeatureUnsupported,
    Mode,
    Pagemap,
    UffdError,
    is_resident,
    madvise,
    punch_hole,
    query_mapping,
    touch,
)
from uffd.touch import AccessFault, guarded_accesses, guarded_load

from ..attempt import (
    MARK,
    Answer,
    Unexpected,
    answer_for,
    expect,
    loading,
    next_fault,
    open_context,
    storing,
)
from ..kinds import ANON, FILE_PRIVATE, SHMEM, Kind, hugetlb_kinds
from ..row import Check, Outcome, Tier, yes
from . import operations

_GROUP = "tracking"
_ASYNC = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
_SIGSEGV = 11


def dirty(kind: Kind) -> Outcome:
    """Write, and find exactly that page written: by asynchronous write protection, and on kernels
    without it by a message for each first write.
    """
    try:
        return _dirty(kind)
    except FeatureUnsupported:
        pass
    except (Answer, Unexpected, UffdError) as error:
        return answer_for(error, "6.7")
    try:
        return _dirty_by_messages(kind)
    except (Answer, Unexpected, UffdError) as error:
        return answer_for(error, _since(kind))


def _since(kind: Kind) -> str:
    """The release that brings it at all: with messages, or for disk files without only."""
    if kind is FILE_PRIVATE:
        return "6.7"
    return "5.7" if kind is ANON else "5.19"


def _dirty_by_messages(kind: Kind) -> Outcome:
    uffd = open_context(Feature.PAGEFAULT_FLAG_WP, optional=Feature.WP_HUGETLBFS_SHMEM)
    region = kind.make(2 * kind.page_size, True)
    for page in range(2):
        touch.store(region.page(page), 1)  # a hole cannot be protected everywhere
    uffd.register(region, Mode.WP)
    uffd.write_protect(region)
    expect(touch.load(region.address) == 1, "a page with protection cannot be read")
    writer = storing(region.page(1), MARK)
    fault = next_fault(uffd, region.page(1))
    expect(fault.is_write_protect and fault.is_write, "not reported as a write-protect fault")
    uffd.write_unprotect(region.page(1), kind.page_size)
    writer.result()
    expect(not uffd.read_events(), "a page counted as written that nobody wrote")
    return yes("the written page, and only it, by a message (no WP_ASYNC)")


def _dirty(kind: Kind) -> Outcome:
    uffd = open_context(_ASYNC, optional=Feature.WP_HUGETLBFS_SHMEM)
    region = kind.make(2 * kind.page_size, True)
    end = region.address + region.length
    touch.load(region.address)  # huge pages: a hole cannot be protected by a scan
    touch.load(region.page(1))
    uffd.register(region, Mode.WP)
    uffd.write_protect(region)
    with Pagemap() as pagemap:
        before = list(pagemap.written_and_protect(region.address, end))
        expect(not before, "pages counted as written before anybody wrote")
        touch.store(region.page(1), MARK)
        found = [
            (part.start, part.end) for part in pagemap.written_and_protect(region.address, end)
        ]
    expect(
        found == [(region.page(1), end)], f"{len(found)} ranges found written instead of one page"
    )
    return yes("the written page, and only it")


def discard(kind: Kind) -> Outcome:
    """A placed page is thrown away again, and faults anew."""
    try:
        return _discard(kind)
    except (Answer, Unexpected, UffdError) as error:
        return answer_for(error, "4.11")


def _discard(kind: Kind) -> Outcome:
    region, uffd = kind.map(), open_context()
    uffd.register(region)
    operations.place(uffd, region.address, region.page_size)
    if region.fd is None:
        region.advise(Advice.DONTNEED, 0, region.page_size)
    else:
        punch_hole(region.fd, 0, region.page_size)
    expect(not is_resident(region.address, region.page_size), "the page is still there")
    loading(region.address)
    expect(next_fault(uffd, region.address).is_missing, "the page was not reported as missing")
    return yes("MADV_DONTNEED" if region.fd is None else "hole punched in the file")


def pagemap_scan() -> Outcome:
    """PAGEMAP_SCAN finds what is present; the walk behind asynchronous tracking."""
    region = ANON.make(4 * ANON.page_size, False)
    touch.store(region.page(3), MARK)
    with Pagemap() as pagemap:
        found = pagemap.scan(
            region.address, region.address + region.length, mask=Category.PRESENT
        ).regions
    where = [(part.start, part.length) for part in found]
    expect(where == [(region.page(3), region.page_size)], "the present page was not found")
    return yes("page tables can be asked")


def procmap_query() -> Outcome:
    """PROCMAP_QUERY answers for one address, without reading the whole of /proc/self/maps."""
    region = SHMEM.map()
    info = query_mapping(region.address)
    expect(info is not None and info.start == region.address, "another mapping was found")
    return yes("mappings can be asked by address")


def guard_pages() -> Outcome:
    """MADV_GUARD_INSTALL: a touch is SIGSEGV, without a mapping of its own."""
    region = ANON.map()
    madvise(region.address, region.length, Advice.GUARD_INSTALL)
    with guarded_accesses():
        try:
            guarded_load(region.address)
        except AccessFault as fault:
            expect(fault.signal == _SIGSEGV, f"signal {fault.signal} instead of SIGSEGV")
            return yes("guards without mappings of their own")
    raise Unexpected("the guarded page could be read")


def checks() -> list[Check]:
    """The rows about tracking and discarding."""
    huge = [kind for kind in hugetlb_kinds() if kind.is_shared]
    found = [
        Check(
            f"discard-{kind.name}",
            f"discarding pages: {kind.title}",
            Tier.REQUIRED if kind is ANON else kind.tier,
            _GROUP,
            partial(discard, kind),
            "4.11" if kind is not ANON else "4.3",
            lock=kind.lock,
            weight=operations.SLOW_WEIGHT if kind.is_slow else 1,
        )
        for kind in (ANON, SHMEM, *huge)
    ]
    found += [
        Check(
            f"dirty-{kind.name}",
            f"finding writes: {kind.title}",
            Tier.REQUIRED if kind is ANON else kind.tier,
            _GROUP,
            partial(dirty, kind),
            _since(kind),
            lock=kind.lock,
        )
        for kind in (
            ANON,
            SHMEM,
            FILE_PRIVATE,
            *(kind for kind in huge if not kind.is_slow),
        )
    ]
    optional = Tier.OPTIONAL
    return [
        *found,
        Check("pagemap-scan", "PAGEMAP_SCAN", optional, _GROUP, pagemap_scan, "6.7"),
        Check("procmap-query", "PROCMAP_QUERY", optional, _GROUP, procmap_query, "6.11"),
        Check("guard-pages", "MADV_GUARD_INSTALL", optional, _GROUP, guard_pages, "6.13"),
    ]
