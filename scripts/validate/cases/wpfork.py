"""What becomes of write protection in a fork child."""

import os

from scripts.validate import uring
from scripts.validate.actors import Channel, Sleeper, Subject, in_child, next_event, next_fault
from scripts.validate.bench import Bench, entry, marked
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, refused, same
from scripts.validate.host import Need, feature, mode, swap
from scripts.validate.kinds import ALL, KINDS, pattern
from uffd import Advice, Feature, Fork, Mapping, Mode, Userfaultfd

_FORK = feature(Feature.EVENT_FORK)
_SWAPPABLE = ("anon", "shmem", "shmem-private")
_PAGES = 2


def _protected(bench: Bench, features: Feature = Feature.NONE) -> tuple[Userfaultfd, Mapping]:
    """Memory with contents, its first page write-protected, its second not."""
    uffd, memory = bench.open(features), bench.map(_PAGES)
    uffd.register(memory, Mode.WP)
    memory.write(0, pattern(memory))
    return uffd, memory


def _protect(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.write_protect(memory.address, memory.page_size)
    same(marked(memory), [True, False], "marks before the fork")


def _look(memory: Mapping, expected: list[bool]) -> None:
    """What a child sees of its own memory."""
    same(marked(memory), expected, "marks in the child")
    same(memory.read(0, memory.length), pattern(memory), "contents in the child")


def _frame(memory: Mapping) -> int | None:
    """Where the first page is; 0 where we may not know (not root)."""
    return entry(memory.address).frame_number


def _has_own_page(memory: Mapping, parents: int | None) -> None:
    """A private page was copied for the child already; a shared one never is."""
    if not parents:
        return
    if memory.is_shared:
        memory.load(0)  # a fork leaves shared pages to be mapped anew
        same(_frame(memory), parents, "frame of the shared page")
    else:
        expect(_frame(memory) not in (None, parents), "the child has a page of its own")


@case("unit", on=ALL, needs_of=mode(Mode.WP))
def wp_fork(bench: Bench) -> None:
    """Without the fork event the protection is gone in a fork child, which may write."""
    uffd, memory = _protected(bench)
    _protect(uffd, memory)

    def child() -> None:
        _look(memory, [False, False])
        memory.store(0, 9)  # would sleep for ever if still protected
        same(memory.load(0), 9, "byte the child wrote")

    in_child(child)
    same(marked(memory), [True, False], "marks in the parent")


def _page_out(memory: Mapping) -> None:
    memory.advise(Advice.PAGEOUT)
    if any(entry(memory.page(i)).is_present for i in range(_PAGES)):
        raise Skipped("the kernel did not swap the pages out")


def _with_event(bench: Bench, prepare: str = "") -> None:
    """A subject forks with the fork event; the case, as its monitor, receives the child's fd."""

    def body(channel: Channel) -> None:
        uffd, memory = _protected(bench, Feature.EVENT_FORK)
        channel.say("uffd", [uffd.fileno()])
        pins = uring.pin(memory.address, memory.length) if prepare == "pin" else None
        _protect(uffd, memory)
        if prepare == "swap":
            _page_out(memory)
        frame = _frame(memory)

        def child() -> None:
            same(marked(memory), [True, False], "marks in the child")
            if prepare == "pin":
                _has_own_page(memory, frame)
            if prepare == "unshare":
                _pin_for_reading(memory, frame)
                _has_own_page(memory, frame)
                same(marked(memory), [True, False], "marks in the child after a pinned read")
            memory.store(memory.page_size, 5)  # not protected
            channel.say("writes")
            memory.store(0, 6)  # protected: the monitor has to let it
            same(memory.load(0), 6, "byte the child wrote")

        in_child(child)
        same(marked(memory), [True, False], "marks in the parent afterwards")
        del pins

    subject = Subject(body)
    uffd = subject.uffd()
    event = next_event(uffd)
    expect(isinstance(event, Fork), f"a fork message comes, not {event}")
    assert isinstance(event, Fork)
    same(event.child.features, uffd.features, "features of the child's context")
    same(subject.channel.hear(), "writes", "the child gets as far as its write")
    fault = next_fault(event.child)
    expect(fault.is_write_protect and fault.is_write, f"a write-protect fault, not {fault}")
    event.child.write_unprotect(fault.address, bench.kind.page_size)
    subject.result()


@case("unit", on=ALL, needs=[_FORK], needs_of=mode(Mode.WP))
def wp_fork_with_event(bench: Bench) -> None:
    """With the fork event the child keeps the protection, its writes are messages of its own
    context, and the reader receives that context's fd.
    """
    _with_event(bench)


@case("unit", on=_SWAPPABLE, needs=[_FORK, swap()], needs_of=mode(Mode.WP))
def wp_fork_with_event_swapped(bench: Bench) -> None:
    """The same when the pages are swapped out at the time of the fork."""
    _with_event(bench, "swap")


def pin_need() -> Need:
    """io_uring that may pin pages."""

    def missing(_: object) -> Skipped | None:
        return uring.why_not()

    return Need("io_uring", missing)


@case("unit", on=ALL, needs=[pin_need()], needs_of=mode(Mode.WP))
def wp_fork_pin(bench: Bench) -> None:
    """Without the fork event, when the page is pinned (io_uring fixed buffers) before the fork,
    which copies private pages early: the copy in the child is not protected, the parent's page is.
    """
    uffd, memory = _protected(bench)
    pins = uring.pin(memory.address, memory.length)
    _protect(uffd, memory)
    frame = _frame(memory)

    def child() -> None:
        _has_own_page(memory, frame)
        _look(memory, [False, False])

    in_child(child)
    same(marked(memory), [True, False], "marks in the parent")
    same(memory.read(0, memory.length), pattern(memory), "contents in the parent")
    os.close(pins)


@case("unit", on=ALL, needs=[_FORK, pin_need()], needs_of=mode(Mode.WP))
def wp_fork_pin_with_event(bench: Bench) -> None:
    """With the fork event, when the page is pinned before the fork: the child's early copy keeps
    the protection.
    """
    _with_event(bench, "pin")


def _pin_for_reading(memory: Mapping, parents: int | None) -> None:
    """A direct write to a disk file pins its source page for reading, which gives the child of a
    fork a page of its own first. Needs a file system with O_DIRECT.
    """
    if uring.direct_write(memory.address, memory.page_size) < 0:
        raise Skipped("no file system here takes direct writes", "TMPDIR=/a/disk/directory")
    if parents and not memory.is_shared and _frame(memory) == parents:
        raise Skipped("a direct write pins no pages on this kernel")


@case("unit", on=ALL, needs_of=mode(Mode.WP))
def wp_fork_pin_child(bench: Bench) -> None:
    """Without the fork event, when the child pins the shared page read-only, which unshares it:
    it is not protected there, and stays so in the parent.
    """
    uffd, memory = _protected(bench)
    _protect(uffd, memory)
    if uring.direct_write(memory.page(1), memory.page_size) < 0:
        raise Skipped("no file system here takes direct writes", "TMPDIR=/a/disk/directory")

    frame = _frame(memory)

    def child() -> None:
        _pin_for_reading(memory, frame)
        _has_own_page(memory, frame)
        _look(memory, [False, False])

    in_child(child)
    same(marked(memory), [True, False], "marks in the parent")


@case("unit", on=ALL, needs=[_FORK], needs_of=mode(Mode.WP))
def wp_fork_pin_child_with_event(bench: Bench) -> None:
    """With the fork event, when the child pins the shared page read-only: its own page stays
    protected.
    """
    if KINDS[bench.variant].is_hugetlb and not KINDS[bench.variant].is_shared:
        bench.remark("unsharing a private huge page takes one more from the pool")
    _with_event(bench, "unshare")


@case("unit", on=ALL, needs_of=mode(Mode.WP))
def wp_write(bench: Bench) -> None:
    """A write to a protected page waits, its message has the flags WRITE and WP, reads pass;
    unprotecting lets it go on; protecting where nothing is registered is refused.
    """
    uffd, memory = _protected(bench)
    _protect(uffd, memory)
    same(memory.load(1), pattern(memory)[1], "byte read from the protected page")
    writer = Sleeper(lambda: memory.store(3, 8))
    fault = next_fault(uffd)
    same((fault.address, int(fault.flags)), (memory.address, 3), "message of the write")
    uffd.write_unprotect(memory.address, memory.page_size)
    writer.join("the writer")
    same(memory.load(3), 8, "byte written")
    same(marked(memory), [False, False], "marks afterwards")
    other = bench.map(1)
    with refused(2, what="WRITEPROTECT of memory that is not registered"):
        uffd.write_protect(other)
