"""Read/write protection across fork, pinning and swap (Linux 7.3)."""

import os

from scripts.validate import uring
from scripts.validate.actors import Channel, Subject, in_child, next_event, next_fault
from scripts.validate.bench import Bench, entry
from scripts.validate.case import case
from scripts.validate.cases.rwp import RWP, protected
from scripts.validate.cases.wpfork import pin_need
from scripts.validate.check import Skipped, expect, same
from scripts.validate.host import feature, swap
from scripts.validate.kinds import ALL, pattern
from uffd import Advice, Feature, Fork

_FORK = feature(Feature.RWP | Feature.EVENT_FORK)


def _inherited(bench: Bench, *, pinned: bool = False, swapped: bool = False) -> None:
    def body(channel: Channel) -> None:
        uffd, memory = protected(bench, Feature.RWP | Feature.EVENT_FORK, pages=2)
        uffd.read_write_unprotect(memory)
        pins = uring.pin(memory.address, memory.length) if pinned else -1
        uffd.read_write_protect(memory)
        if swapped:
            memory.advise(Advice.PAGEOUT)
            if entry(memory.address).is_present:
                raise Skipped("the kernel did not swap the page out")
        channel.say("uffd", [uffd.fileno()])

        def child() -> None:
            same(memory.load(0), pattern(memory)[0], "byte read in the child")
            if swapped:
                memory.store(1, 7)  # unprotected by now: copies the shared page
                same(memory.load(1), 7, "byte written in the child")

        in_child(child)
        if pins >= 0:
            os.close(pins)

    subject = Subject(body)
    uffd = subject.uffd()
    event = next_event(uffd)
    expect(isinstance(event, Fork), f"a fork message, not {event}")
    assert isinstance(event, Fork)
    fault = next_fault(event.child)
    expect(fault.is_read_write_protect, f"the child's access is an RWP message, not {fault}")
    event.child.read_write_unprotect(fault.address, bench.kind.page_size)
    subject.result()


@case("rwp", on=ALL, needs=[RWP, _FORK])
def rwp_fork(bench: Bench) -> None:
    """Protection is inherited with the fork event: the child's access is its own message."""
    _inherited(bench)


@case("rwp", on=["anon"], needs=[RWP, _FORK, pin_need()])
def rwp_fork_pin(bench: Bench) -> None:
    """Protection is kept when a pinned page is copied at fork."""
    _inherited(bench, pinned=True)


@case("rwp", on=["anon", "shmem-private"], needs=[RWP, _FORK, swap()])
def rwp_swap_cow(bench: Bench) -> None:
    """Protection is kept through the swap of a page shared by a fork."""
    _inherited(bench, swapped=True)
