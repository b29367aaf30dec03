"""Traps of registered memory: who else faults there, and what survives mremap and fork."""

import os

from scripts.validate.actors import in_child, loading, next_fault
from scripts.validate.bench import Bench, marked
from scripts.validate.case import case
from scripts.validate.check import expect, refused, same
from scripts.validate.host import mode
from scripts.validate.kinds import ALL, pattern
from uffd import Advice, Mode, mincore


@case("traps", on=ALL, needs_of=mode(Mode.MISSING), name="fork-without-the-event")
def fork_without_the_event(bench: Bench) -> None:
    """Without the fork event a child is not registered: what is missing reads as zeros there, what
    was placed is there.
    """
    uffd, memory = bench.registered(pages=2)
    size = memory.page_size
    uffd.copy(memory.address, bench.page(0))

    def child() -> None:
        same(memory.read(0, size), bench.page(0), "page that was placed, in the child")
        same(memory.read(size, size), bytes(size), "missing page, in the child")

    in_child(child)
    same(uffd.read_events(), [], "messages")


@case("traps", on=ALL, needs_of=mode(Mode.MISSING), name="mremap-without-the-event")
def mremap_without_the_event(bench: Bench) -> None:
    """Without the remap event mremap drops the registration: COPY to the new place says that
    nothing is registered, and what is missing reads as zeros.
    """
    uffd, memory = bench.registered(pages=2)
    size = memory.page_size
    uffd.copy(memory.address, bench.page(0))
    moved = memory.remap()
    with refused(2, what="COPY to the new place"):
        uffd.copy(moved.page(1), bench.page(1))
    same(moved.read(0, size), bench.page(0), "page that was placed")
    same(moved.read(size, size), bytes(size), "missing page")


@case("traps", on=ALL, needs_of=mode(Mode.MISSING), name="closing-invents-zeros")
def closing_invents_zeros(bench: Bench) -> None:
    """Closing the last fd wakes every waiter, read or not, and what is missing reads as zeros; a
    duplicate of the fd keeps everything as it was.
    """
    uffd, memory = bench.registered(pages=2)
    duplicate = os.dup(uffd.fileno())
    read = loading(memory.page(0) + 1)
    next_fault(uffd)
    unread = loading(memory.page(1) + 1)
    expect(uffd.wait(10.0), "a second message waits")
    uffd.close()
    expect(read.is_asleep and unread.is_asleep, "both sleep on while a duplicate is open")
    os.close(duplicate)
    same((read.join(), unread.join()), (0, 0), "bytes read")


@case("traps", on=ALL, needs_of=mode(Mode.MISSING), name="mincore-does-not-fault")
def mincore_does_not_fault(bench: Bench) -> None:
    """mincore says 0 for a missing page and reports no fault."""
    uffd, memory = bench.registered(pages=2)
    size = memory.page_size
    uffd.copy(memory.page(1), bench.page(1))
    found = mincore(memory.address, memory.length)
    same((found[0], found[-1]), (0, 1), "residency")
    same(uffd.read_events(), [], "messages")
    same(memory.read(size, size), bench.page(1), "contents")


@case("traps", on=ALL, needs_of=mode(Mode.WP), name="dontneed-drops-protection")
def dontneed_drops_protection(bench: Bench) -> None:
    """DONTNEED drops the protection of anonymous pages; in mappings of files, private ones and
    huge pages too, it stays as a marker.
    """
    uffd, memory = bench.registered(Mode.WP, pages=1)
    memory.write(0, pattern(memory))
    uffd.write_protect(memory)
    same(marked(memory), [True], "mark before")
    memory.advise(Advice.DONTNEED)
    same(marked(memory), [bench.kind.is_file], "mark after DONTNEED")
    uffd.write_unprotect(memory)
    same(marked(memory), [False], "mark once unprotected")
