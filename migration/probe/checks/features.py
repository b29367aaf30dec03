"""Every feature bit: reported, accepted when asked for, and doing what its name says."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from guestmem.geometry import THP_BYTES
from uffd import (
    Advice,
    Category,
    FaultHandler,
    Feature,
    Fork,
    Mapping,
    Mode,
    Pagemap,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
    kernel_support,
    touch,
)
from uffd.touch import AccessFault, guarded_accesses, guarded_load

from ..attempt import (
    MARK,
    Answer,
    Sleeper,
    Unexpected,
    answer_for,
    base_page,
    expect,
    loading,
    names_of,
    next_event,
    next_fault,
    open_context,
    page_bytes,
    patience_s,
    storing,
)
from ..kinds import ANON, SHMEM, hugetlb_kinds
from ..row import Cause, Check, Outcome, Tier, untested, yes
from . import operations

_GROUP = "features"
_ODD_BYTE = 123


def _anonymous(pages: int = 1) -> Mapping:
    return Mapping.anonymous(pages * base_page())


def fork_event(uffd: Userfaultfd) -> None:
    """fork(2) brings the child's own context. Read natively: os.fork holds the lock meanwhile."""
    region, arrived = _anonymous(), threading.Event()
    children: list[Fork] = []

    def on_event(event: object) -> None:
        if isinstance(event, Fork):
            children.append(event)
            arrived.set()

    uffd.register(region)
    FaultHandler(uffd, [], on_event=on_event).start()
    child = os.fork()
    if child == 0:
        os._exit(touch.load(region.address))
    expect(arrived.wait(patience_s()), "no message came")
    theirs = children[0].child
    next_fault(theirs, region.address)
    theirs.copy(region.address, page_bytes(region.length))
    _, status = os.waitpid(child, 0)
    expect(os.waitstatus_to_exitcode(status) == MARK, "the child read other bytes")


def remap_event(uffd: Userfaultfd) -> None:
    """mremap(2) tells the new place. With EVENT_UNMAP too, an unmapping of the old would follow."""
    region = _anonymous()
    uffd.register(region)
    mover = Sleeper(region.remap)
    event = next_event(uffd)
    expect(isinstance(event, Remap), f"{type(event).__name__} came instead of a move")
    new = mover.result()
    expect(
        isinstance(event, Remap) and event.destination == new.address, "the wrong place was told"
    )


def remove_event(uffd: Userfaultfd) -> None:
    """madvise(MADV_DONTNEED) tells what goes: balloons and free page reporting."""
    region = _anonymous()
    uffd.register(region)
    remover = Sleeper(lambda: region.advise(Advice.DONTNEED))
    event = next_event(uffd)
    expect(
        isinstance(event, Remove)
        and (event.start, event.length) == (region.address, region.length),
        f"{type(event).__name__} came",
    )
    remover.result()


def unmap_event(uffd: Userfaultfd) -> None:
    """munmap(2) tells what went."""
    region = _anonymous()
    address = region.address
    uffd.register(region)
    remover = Sleeper(region.close)
    event = next_event(uffd)
    expect(isinstance(event, Unmap) and event.start == address, f"{type(event).__name__} came")
    remover.result()


def sigbus(uffd: Userfaultfd) -> None:
    """A touch of a missing page is a SIGBUS, and no message comes."""
    region = _anonymous()
    uffd.register(region)
    with guarded_accesses():
        try:
            guarded_load(region.address + _ODD_BYTE)
        except AccessFault as fault:
            expect(fault.signal == signal.SIGBUS, f"signal {fault.signal} instead")
            expect(fault.address == region.address + _ODD_BYTE, "the wrong address was told")
            return
    raise Unexpected("the missing page could be read")


def thread_id(uffd: Userfaultfd) -> None:
    """The message names the faulting thread: blocktime per vCPU."""
    region = _anonymous()
    uffd.register(region)
    reader = loading(region.address)
    fault = next_fault(uffd, region.address)
    expect(fault.thread_id == reader.thread.native_id, f"thread {fault.thread_id} was named")


def exact_address(uffd: Userfaultfd) -> None:
    """The message has the byte, not the page."""
    region = _anonymous()
    uffd.register(region)
    loading(region.address + _ODD_BYTE)
    next_fault(uffd, region.address + _ODD_BYTE)


def wp_unpopulated(uffd: Userfaultfd) -> None:
    """A page that was never there can be protected against its first write."""
    region = _anonymous()
    uffd.register(region, Mode.WP)
    uffd.write_protect(region)
    storing(region.address, MARK)
    fault = next_fault(uffd, region.address)
    expect(fault.is_write_protect, "reported, but not as a write-protect fault")


def wp_async(uffd: Userfaultfd) -> None:
    """The write goes through at once, and PAGEMAP_SCAN finds the page."""
    region = _anonymous(4)
    uffd.register(region, Mode.WP)
    end = region.address + region.length
    with Pagemap() as pagemap:
        list(pagemap.written_and_protect(region.address, end))
        touch.store(region.page(2), MARK)
        found = [
            (part.start, part.end) for part in pagemap.written_and_protect(region.address, end)
        ]
    expect(found == [(region.page(2), region.page(3))], f"{len(found)} ranges found written")


def rwp_async(uffd: Userfaultfd) -> None:
    """The access goes through at once, and PAGEMAP_SCAN finds the page."""
    region = _anonymous(4)
    touch.fill(region.address, MARK, region.length)
    uffd.register(region, Mode.RWP)
    uffd.read_write_protect(region)
    touch.load(region.page(2))
    with Pagemap() as pagemap:
        found = pagemap.scan(
            region.address,
            region.address + region.length,
            mask=Category.ACCESSED,
            returned=Category.ACCESSED,
        )
    seen = [(part.start, part.end) for part in found.regions]
    expect(seen == [(region.page(2), region.page(3))], f"{len(seen)} ranges found accessed")


def on_hugetlb(mode: Mode) -> Callable[[Userfaultfd], None]:
    """Registering takes no page, so this needs no pool; placing one is another row's business."""

    def run(uffd: Userfaultfd) -> None:
        kind = next(kind for kind in hugetlb_kinds() if kind.page_size == THP_BYTES)
        uffd.register(kind.map(reserve=False), mode)

    return run


def by_operation(run: Callable[..., Outcome], kind: object) -> Callable[[Userfaultfd], None]:
    """A bit that only announces: what it announces is tried on a context of its own."""

    def attempt(_: Userfaultfd) -> None:
        run(kind)

    return attempt


@dataclass(frozen=True, slots=True)
class Bit:
    """A feature bit and how it shows."""

    feature: Feature
    since: str
    tier: Tier
    means: str
    run: Callable[[Userfaultfd], None]
    needs: Feature = Feature.NONE


_F, _T = Feature, Tier
BITS = (
    Bit(
        _F.PAGEFAULT_FLAG_WP,
        "5.7",
        _T.OPTIONAL,
        "write protection of anonymous memory",
        by_operation(operations.writeprotect, ANON),
    ),
    Bit(_F.EVENT_FORK, "4.11", _T.OPTIONAL, "a fork is told", fork_event),
    Bit(_F.EVENT_REMAP, "4.11", _T.OPTIONAL, "a move is told", remap_event),
    Bit(_F.EVENT_REMOVE, "4.11", _T.OPTIONAL, "a discard is told", remove_event),
    Bit(
        _F.MISSING_HUGETLBFS,
        "4.11",
        _T.HUGEPAGES,
        "missing faults on huge pages",
        on_hugetlb(Mode.MISSING),
    ),
    Bit(
        _F.MISSING_SHMEM,
        "4.11",
        _T.SHARED,
        "missing faults on shared memory",
        by_operation(operations.copy, SHMEM),
    ),
    Bit(_F.EVENT_UNMAP, "4.11", _T.OPTIONAL, "an unmapping is told", unmap_event),
    Bit(_F.SIGBUS, "4.14", _T.OPTIONAL, "a signal instead of a message", sigbus),
    Bit(_F.THREAD_ID, "4.14", _T.OPTIONAL, "messages name the thread", thread_id),
    Bit(
        _F.MINOR_HUGETLBFS,
        "5.13",
        _T.HUGEPAGES,
        "minor faults on huge pages",
        on_hugetlb(Mode.MISSING | Mode.MINOR),
    ),
    Bit(
        _F.MINOR_SHMEM,
        "5.14",
        _T.SHARED,
        "minor faults on shared memory",
        by_operation(operations.continue_, SHMEM),
    ),
    Bit(_F.EXACT_ADDRESS, "5.18", _T.OPTIONAL, "messages name the byte", exact_address),
    Bit(
        _F.WP_HUGETLBFS_SHMEM,
        "5.19",
        _T.SHARED,
        "write protection of shared memory",
        by_operation(operations.writeprotect, SHMEM),
    ),
    Bit(_F.WP_UNPOPULATED, "6.4", _T.OPTIONAL, "holes can be protected", wp_unpopulated),
    Bit(
        _F.POISON,
        "6.6",
        _T.OPTIONAL,
        "lost pages give SIGBUS, not zeros",
        by_operation(operations.poison, ANON),
    ),
    Bit(_F.WP_ASYNC, "6.7", _T.OPTIONAL, "writes noted without messages", wp_async),
    Bit(
        _F.MOVE,
        "6.8",
        _T.OPTIONAL,
        "pages placed without a copy",
        by_operation(operations.move, ANON),
    ),
    Bit(
        _F.RWP,
        "7.3",
        _T.OPTIONAL,
        "accesses can be caught",
        by_operation(operations.rwprotect, ANON),
    ),
    Bit(
        _F.RWP_ASYNC, "7.3", _T.OPTIONAL, "accesses noted without messages", rwp_async, needs=_F.RWP
    ),
)


def try_bit(bit: Bit) -> Outcome:
    """Reported, accepted, and shown."""
    try:
        bit.run(open_context(bit.feature | bit.needs))
        outcome = yes()
    except (Answer, Unexpected, OSError) as error:
        outcome = answer_for(error, bit.since)
    return replace(outcome, detail=bit.means)


def unknown() -> Outcome:
    """What a kernel newer than this version reports: shown, kept, never asked for."""
    open_context()
    more = kernel_support().features.unknown
    if not more:
        return yes("none: this kernel reports no such bit")
    return untested(
        Cause.KERNEL,
        f"this kernel reports {names_of(more)}, which this version has no name for",
        "a newer version of this program",
    )


def checks() -> list[Check]:
    """The rows about feature bits."""
    found = [
        Check(
            f"feature-{_name(bit).lower().replace('_', '-')}",
            _name(bit),
            bit.tier,
            _GROUP,
            partial(try_bit, bit),
            bit.since,
            aliases=(_name(bit), f"UFFD_FEATURE_{_name(bit)}"),
        )
        for bit in BITS
    ]
    title = "bits without a name here"
    return [*found, Check("feature-unknown", title, Tier.OPTIONAL, _GROUP, unknown)]


def _name(bit: Bit) -> str:
    return bit.feature.name or hex(bit.feature)
