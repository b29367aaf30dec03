"""Every ioctl on every kind of memory: a row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from guestmem.geometry import THP_BYTES
from uffd import (
    Advice,
    BadAddress,
    Feature,
    Mapping,
    Mode,
    OutOfMemory,
    Registration,
    UffdError,
    Userfaultfd,
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
    page_bytes,
    storing,
)
from ..kinds import Kind, all_kinds, is_huge, no_free_page
from ..row import Cause, Check, Outcome, Status, Tier, no, yes

_SIGBUS = 7
SLOW_WEIGHT = 10
_FILE = "only memory can be registered: anonymous, shmem, hugetlb"


def source_of(length: int) -> Mapping | bytes:
    """What to copy from: :data:`MARK` first, and for gigabytes zeros that cost no memory.

    Present before the ioctl: on hugetlb the kernel copies with faults switched off.
    """
    if length <= THP_BYTES:
        return page_bytes(length)
    room = Mapping.anonymous(length)
    touch.store(room.address, MARK)
    room.advise(Advice.HUGEPAGE)
    room.advise(Advice.POPULATE_READ)
    return room


def place(uffd: Userfaultfd, address: int, length: int) -> None:
    """COPY one host page that starts with :data:`MARK`.

    :raises Unexpected: less than asked was placed.
    """
    source = source_of(length)
    if isinstance(source, Mapping):
        placed = uffd.copy(address, source.address, length)
    else:
        placed = uffd.copy(address, source)
    expect(placed == length, f"COPY placed {placed} of {length} bytes")


def register(kind: Kind) -> Outcome:
    """REGISTER and UNREGISTER; needs no page of the pool."""
    region, uffd = kind.map(reserve=False), open_context()
    found: Registration = uffd.register(region)
    uffd.unregister(region)
    return yes(f"offers {int(found.ioctls):#x}")


def wake(kind: Kind) -> Outcome:
    """A woken thread looks again: the page is still missing, so a second message comes."""
    region, uffd = kind.map(reserve=False), open_context()
    uffd.register(region)
    loading(region.address)
    fault = next_fault(uffd, region.address)
    expect(fault.is_missing and not fault.is_write, "a read of a missing page was reported as not")
    uffd.wake(region.address, region.page_size)
    next_fault(uffd, region.address)
    return yes("the sleeper looked again")


def copy(kind: Kind) -> Outcome:
    """A thread sleeps on a missing page, COPY places it, the thread reads its bytes."""
    region, uffd = kind.map(), open_context()
    uffd.register(region)
    reader = loading(region.address)
    next_fault(uffd, region.address)
    place(uffd, region.address, region.page_size)
    expect(reader.result() == MARK, "the thread read other bytes than were placed")
    return yes("fault, COPY, wake")


def zeropage(kind: Kind) -> Outcome:
    """The same with ZEROPAGE."""
    region, uffd = kind.map(reserve=False), open_context()
    uffd.register(region)
    reader = loading(region.address)
    next_fault(uffd, region.address)
    uffd.zeropage(region.address, region.page_size)
    expect(reader.result() == 0, "the zero page was not zero")
    return yes("fault, ZEROPAGE, wake")


def continue_(kind: Kind) -> Outcome:
    """The page is in the page cache, put there through another mapping; CONTINUE maps it here."""
    # The one huge page is reserved by the mapping that fills it.
    region, uffd = kind.map(reserve=False, fill=True), open_context()
    uffd.register(region, Mode.MISSING | Mode.MINOR)
    touch.store(_alias(kind, region).address, MARK)
    reader = loading(region.address)
    fault = next_fault(uffd, region.address)
    expect(fault.is_minor, "the page was in the page cache, but the fault was not minor")
    uffd.continue_(region.address, region.page_size)
    expect(reader.result() == MARK, "the mapped page has other bytes than the file")
    return yes("minor fault, CONTINUE, wake")


def _alias(kind: Kind, region: Mapping) -> Mapping:
    try:
        return region.alias()
    except OutOfMemory:
        if not kind.is_hugetlb:
            raise
        raise Answer(no_free_page(kind.page_size)) from None


def writeprotect(kind: Kind) -> Outcome:
    """A write to a protected page sleeps until the protection is taken away."""
    region, uffd = kind.map(), open_context()
    touch.store(region.address, 1)
    uffd.register(region, Mode.WP)
    uffd.write_protect(region.address, region.page_size)
    writer = storing(region.address, MARK)
    fault = next_fault(uffd, region.address)
    expect(fault.is_write_protect and fault.is_write, "not reported as a write-protect fault")
    expect(touch.load(region.address) == 1, "the write went through the protection")
    uffd.write_unprotect(region.address, region.page_size)
    writer.result()
    expect(touch.load(region.address) == MARK, "the write was lost")
    return yes("write fault, then let through")


def poison(kind: Kind) -> Outcome:
    """A touch of a poisoned page is a SIGBUS, not a zero."""
    region, uffd = kind.map(reserve=False), open_context()
    uffd.register(region)
    uffd.poison(region.address, region.page_size)
    with guarded_accesses():
        try:
            guarded_load(region.address)
        except AccessFault as fault:
            expect(fault.signal == _SIGBUS, f"signal {fault.signal} instead of SIGBUS")
            return yes("SIGBUS")
    raise Unexpected("a poisoned page could be read")


def move(kind: Kind) -> Outcome:
    """The page leaves one place and appears in the other, without a copy."""
    source, target, uffd = kind.map(reserve=False), kind.map(reserve=False), open_context()
    length = target.length
    if not kind.is_hugetlb:  # there it is refused before anybody looks at the page
        touch.fill(source.address, MARK, length)
    was_huge = is_huge(source)
    uffd.register(target)
    moved = uffd.move(target.address, source.address, length)
    expect(moved == length, f"MOVE moved {moved} of {length} bytes")
    expect(touch.load(target.address) == MARK, "the moved page has other bytes")
    expect(touch.load(source.address) == 0, "the page is still at its old place too")
    if not kind.is_thp:
        return yes("moved")
    whole = was_huge and is_huge(target)
    return yes("2 MiB at once" if whole else "page by page: no huge page was to be had")


def rwprotect(kind: Kind) -> Outcome:
    """Any access to a protected page sleeps until the protection is taken away."""
    uffd = open_context(Feature.RWP)
    region = kind.map()
    touch.store(region.address, MARK)
    uffd.register(region, Mode.RWP)
    uffd.read_write_protect(region.address, region.page_size)
    reader = loading(region.address)
    fault = next_fault(uffd, region.address)
    expect(fault.is_read_write_protect, "not reported as a read/write-protect fault")
    uffd.read_write_unprotect(region.address, region.page_size)
    expect(reader.result() == MARK, "the page changed under protection")
    return yes("read fault, then let through")


@dataclass(frozen=True, slots=True)
class Operation:
    """An ioctl, how it is tried, and since when it works on which memory."""

    name: str
    title: str
    since: str
    run: Callable[[Kind], Outcome]
    since_shmem: str = "4.11"
    since_hugetlb: str = "4.11"

    def since_on(self, kind: Kind) -> str:
        """The release that brings it for this kind of memory."""
        if kind.is_hugetlb:
            return self.since_hugetlb
        return self.since_shmem if kind.tier is Tier.SHARED else self.since


OPERATIONS = (
    Operation("register", "REGISTER", "4.3", register),
    Operation("copy", "COPY", "4.3", copy),
    Operation("zeropage", "ZEROPAGE", "4.3", zeropage),
    Operation("wake", "WAKE", "4.3", wake),
    Operation("continue", "CONTINUE", "5.14", continue_, "5.14", "5.13"),
    Operation("writeprotect", "WRITEPROTECT", "5.7", writeprotect, "5.19", "5.19"),
    Operation("poison", "POISON", "6.6", poison, "6.6", "6.6"),
    Operation("move", "MOVE", "6.8", move, "6.8", "6.8"),
    Operation("rwprotect", "RWPROTECT", "7.3", rwprotect, "7.3", "7.3"),
)

#: Without these nothing migrates: a page is found missing, asked for, and placed.
REQUIRED = frozenset(
    {("register", "anon"), ("copy", "anon"), ("zeropage", "anon"), ("wake", "anon")}
)


def never(operation: Operation, kind: Kind) -> str | None:
    """Why no kernel offers it, where that is so. Only consulted after the kernel has refused."""
    if kind.is_disk_file:
        return _FILE
    if operation.name == "zeropage" and kind.is_hugetlb:
        return "no zero page of that size exists; COPY zeros instead"
    if operation.name == "move" and kind.name not in ("anon", "anon-thp"):
        return "pages move between private anonymous memory only"
    if operation.name == "continue" and kind.name in ("anon", "anon-thp"):
        return "anonymous memory has no page cache to map from"
    return None


def try_cell(operation: Operation, kind: Kind) -> Outcome:
    """One cell of the table, in a process of its own."""
    try:
        outcome = operation.run(kind)
    except (Answer, Unexpected, BadAddress, UffdError) as error:
        outcome = answer_for(error, operation.since_on(kind))
    why = never(operation, kind)
    if why is not None and outcome.status is Status.NO and outcome.cause is Cause.KERNEL:
        return no(Cause.DESIGN, why)
    return outcome


def checks() -> list[Check]:
    """The table, row by row of memory."""
    found = []
    for kind in all_kinds():
        for operation in OPERATIONS:
            is_required = (operation.name, kind.name) in REQUIRED
            found.append(
                Check(
                    f"{operation.name}-{kind.name}",
                    f"{operation.title} on {kind.title} memory",
                    Tier.REQUIRED if is_required else kind.tier,
                    "memory",
                    partial(try_cell, operation, kind),
                    operation.since_on(kind),
                    lock=kind.lock,
                    weight=SLOW_WEIGHT if kind.is_slow else 1,
                )
            )
    return found
