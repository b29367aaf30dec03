"""What becomes of guards: mprotect, mremap, fork, advice, locking, collapse."""

import mmap
import os
import struct

from scripts.validate import raw
from scripts.validate.actors import in_child
from scripts.validate.bench import Bench, entry
from scripts.validate.case import case
from scripts.validate.cases.guard import (
    GUARDS,
    MEMORIES,
    PAGES,
    PRIVATE,
    expect_guards,
    fresh,
    install,
    is_guarded,
    remove,
)
from scripts.validate.check import expect, refused, same
from scripts.validate.host import thp
from scripts.validate.kinds import HUGE, PAGE, aligned, pattern
from uffd import Advice, Mapping, pidfd_open, process_madvise, punch_hole, touch

_RW = mmap.PROT_READ | mmap.PROT_WRITE


@case("guard", on=MEMORIES, needs=[GUARDS], name="mprotect")
def mprotect(bench: Bench) -> None:
    """Guards survive mprotect to read-only and back, and can be installed while read-only."""
    memory = fresh(bench)
    install(memory, 2)
    memory.protect(mmap.PROT_READ)
    expect_guards(memory, {2}, "while read-only")
    if bench.variant not in ("shmem", "file"):
        install(memory, 5)
    memory.protect(_RW)
    expected = {2} if bench.variant in ("shmem", "file") else {2, 5}
    expect_guards(memory, expected, "when writable again")


@case("guard", on=MEMORIES, needs=[GUARDS], name="mremap")
def mremap(bench: Bench) -> None:
    """Guards move along with mremap; growing and shrinking keep those that remain."""
    memory = fresh(bench)
    install(memory, 0)
    install(memory, PAGES - 1)
    moved = memory.remap()
    expect_guards(moved, {0, PAGES - 1}, "after the move")
    smaller = raw.remap(moved.address, moved.length, moved.length - PAGE, 0)
    same(smaller, moved.address, "mremap that shrinks")
    part = Mapping(smaller, moved.length - PAGE, page_size=PAGE, fd=None, is_shared=False)
    expect_guards(part, {0}, "after shrinking")
    same(part.read(PAGE, PAGE), pattern(part, 1, 1), "contents of an ordinary page")


@case("guard", on=MEMORIES, needs=[GUARDS], name="fork")
def fork(bench: Bench) -> None:
    """A fork child has the guards; removing them there leaves the parent's."""
    memory = fresh(bench)
    install(memory, 1, 2)

    def child() -> None:
        expect_guards(memory, {1, 2}, "in the child")
        remove(memory, 1, 2)
        expect_guards(memory, set(), "in the child after the removal")

    in_child(child)
    expect_guards(memory, {1, 2}, "in the parent afterwards")


@case("guard", on=["anon"], needs=[GUARDS], name="fork-copy-on-write")
def fork_copy_on_write(bench: Bench) -> None:
    """Guarding pages shared with a fork child in the child leaves the parent's contents."""
    memory = fresh(bench)

    def child() -> None:
        install(memory, 0, PAGES)
        expect_guards(memory, set(range(PAGES)), "in the child")
        remove(memory, 0, PAGES)
        same(memory.read(0, memory.length), bytes(memory.length), "contents in the child")

    in_child(child)
    same(memory.read(0, memory.length), pattern(memory), "contents in the parent")


@case("guard", on=["anon"], needs=[GUARDS], name="fork-wipe")
def fork_wipe(bench: Bench) -> None:
    """A mapping wiped on fork has no guards in the child, where it is empty anyway."""
    memory = fresh(bench)
    memory.advise(Advice.WIPEONFORK)
    install(memory, 3)
    in_child(lambda: expect_guards(memory, set(), "in the child"))
    expect_guards(memory, {3}, "in the parent")


_KEPT = {
    "DONTNEED": Advice.DONTNEED,
    "COLD": Advice.COLD,
    "PAGEOUT": Advice.PAGEOUT,
    "FREE": Advice.FREE,
    "WILLNEED": Advice.WILLNEED,
}


@case(
    "guard",
    on=[f"{m}:{a}" for m in MEMORIES for a in _KEPT if a != "FREE" or m == "anon"],
    needs=[GUARDS],
    name="advice",
)
def advice(bench: Bench) -> None:
    """Guards survive this advice, with which their mapping's other pages may go."""
    memory = fresh(bench)
    install(memory, 2, 2)
    memory.advise(_KEPT[bench.modifiers[0]])
    expect_guards(memory, {2, 3}, "afterwards")


@case("guard", on=MEMORIES, needs=[GUARDS], name="populate")
def populate(bench: Bench) -> None:
    """Populating a range with a guard in it is refused with EFAULT, for reading and writing, and
    the guard stays.
    """
    memory = fresh(bench)
    install(memory, 4)
    for wanted in (Advice.POPULATE_READ, Advice.POPULATE_WRITE):
        with refused(14, what=f"{wanted.name} over a guard"):
            memory.advise(wanted)
    expect_guards(memory, {4}, "afterwards")
    remove(memory, 4)
    memory.advise(Advice.POPULATE_WRITE)
    expect(entry(memory.page(4)).is_present, "the page can be populated without the guard")


@case("guard", on=MEMORIES, needs=[GUARDS], name="system-calls")
def system_calls(bench: Bench) -> None:
    """System calls on a guarded page fail with EFAULT."""
    memory = fresh(bench)
    install(memory, 1)
    reader, writer = os.pipe()
    same(raw.write(writer, memory.page(1), 8), -14, "write(2) of a guarded page")
    same(raw.write(writer, memory.page(2), 8), 8, "write(2) of its neighbour")
    same(os.read(reader, 8), pattern(memory, 2, 1)[:8], "what was written")
    same(raw.readv(os.getpid(), memory.page(1), 8)[0], -14, "process_vm_readv of a guarded page")


@case("guard", on=["anon"], needs=[GUARDS], name="locked")
def locked(bench: Bench) -> None:
    """Locked memory takes no guards and loses none; what was guarded before cannot be locked in."""
    memory = fresh(bench)
    same(raw.lock(memory.address, 4 * PAGE), 0, "mlock")
    with refused(22, what="GUARD_INSTALL in locked memory"):
        install(memory, 1)
    same(memory.read(0, 4 * PAGE), pattern(memory, 0, 4), "contents of locked memory")
    install(memory, 5)
    expect_guards(memory, {5}, "in the part that is not locked")


@case("guard", on=PRIVATE, needs=[GUARDS], name="split-merge")
def split_merge(bench: Bench) -> None:
    """Splitting a mapping through a guarded range and merging it again keeps the guards."""
    memory = fresh(bench)
    install(memory, 2, 4)
    whole = memory.length
    memory.length = 4 * PAGE
    memory.protect(mmap.PROT_READ)
    memory.length = whole
    expect_guards(memory, {2, 3, 4, 5}, "while split")
    memory.protect(_RW)
    expect_guards(memory, {2, 3, 4, 5}, "when merged")


@case("guard", on=["anon"], needs=[GUARDS, thp()], name="huge-page")
def huge_page(bench: Bench) -> None:
    """A guard in a huge page splits it: the neighbours keep their contents; a guarded range cannot
    be collapsed.
    """
    memory = aligned(HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)
    expected = pattern(memory)
    memory.write(0, expected)
    install(memory, 100)
    with touch.guarded_accesses():
        expect(is_guarded(memory.page(100)), "the page is guarded")
    same(memory.read(0, 100 * PAGE), expected[: 100 * PAGE], "contents before the guard")
    same(memory.read(101 * PAGE, PAGE), expected[101 * PAGE : 102 * PAGE], "contents behind it")
    with refused(22, 16, 11, what="MADV_COLLAPSE over a guard"):
        memory.advise(Advice.COLLAPSE)
    remove(memory, 100)
    same(memory.read(100 * PAGE, PAGE), bytes(PAGE), "contents of the page that was guarded")


@case("guard", on=["anon", "shmem"], needs=[GUARDS], name="process-madvise")
def through_process_madvise(bench: Bench) -> None:
    """One's own pidfd takes guards over several ranges at once."""
    memory = fresh(bench)
    install(memory, 0)
    remove(memory, 0)
    pidfd = pidfd_open(os.getpid())
    ranges = [(memory.page(1), PAGE), (memory.page(4), 2 * PAGE)]
    same(process_madvise(pidfd, ranges, Advice.GUARD_INSTALL), 3 * PAGE, "bytes guarded")
    expect_guards(memory, {1, 4, 5}, "afterwards")
    same(process_madvise(pidfd, ranges, Advice.GUARD_REMOVE), 3 * PAGE, "bytes freed")
    expect_guards(memory, set(), "after the removal")


@case("guard", on=["shmem", "file"], needs=[GUARDS], name="hole-punch")
def hole_punch(bench: Bench) -> None:
    """Punching a hole into the file, or truncating it, leaves the guards of the mapping."""
    memory = fresh(bench)
    install(memory, 2)
    assert memory.fd is not None
    punch_hole(memory.fd, 0, 4 * PAGE)
    expect_guards(memory, {2}, "after the hole")
    os.ftruncate(memory.fd, PAGES // 2 * PAGE)
    with touch.guarded_accesses():
        expect(is_guarded(memory.page(2)), "the page is guarded after truncation")


@case("guard", on=["anon"], needs=[GUARDS], name="vmsplice")
def vmsplice(bench: Bench) -> None:
    """Pinning a guarded page (vmsplice) is refused with EFAULT."""
    sys_vmsplice = 278
    memory = fresh(bench)
    install(memory, 3)
    _, writer = os.pipe()
    vector = struct.pack("<QQ", memory.page(3), 8)
    same(raw.syscall(sys_vmsplice, writer, vector, 1, 0), -14, "vmsplice of a guarded page")
