"""Traps that have no other family: what polling, forking and re-registering really do."""

import select

from scripts.validate.actors import in_child, loading, next_fault
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import expect, refused, same
from scripts.validate.host import feature, mode
from scripts.validate.kinds import ALL, ANON, PAGE, pattern
from uffd import Advice, Category, Feature, Ioctls, Mode, Pagemap, RangeOwnedElsewhere

_MOVE = [feature(Feature.MOVE)]


@case("traps", name="08-poll-of-a-blocking-fd")
def poll_of_a_blocking_fd(bench: Bench) -> None:
    """poll on a blocking userfaultfd always says error, message or not; on a non-blocking one it
    is readable when a message waits.
    """
    memory, blocking = ANON.map(1), bench.open(nonblocking=False)
    blocking.register(memory)
    poller = select.poll()
    poller.register(blocking.fileno(), select.POLLIN)
    error = [(blocking.fileno(), select.POLLERR)]
    same(poller.poll(0), error, "poll with nothing waiting")
    reader = loading(memory.address)
    (fault,) = blocking.read_events(1)  # waits for the message
    same(poller.poll(0), error, "poll with a waiter")
    blocking.zeropage(memory)
    same(reader.join(), 0, "byte read")
    expect(fault is not None, "a message came")

    other, uffd = ANON.map(1), bench.open()
    uffd.register(other)
    expect(not uffd.wait(0), "a non-blocking fd is not readable with nothing waiting")
    reader = loading(other.address)
    expect(uffd.wait(10.0), "a non-blocking fd is readable with a message")
    next_fault(uffd)
    uffd.zeropage(other)
    reader.join()


@case("traps", needs=_MOVE, name="14-fork-makes-move-busy")
def fork_makes_move_busy(bench: Bench) -> None:
    """A source page that was shared with a fork child cannot be moved, also once the child is
    gone, until it is written; DONTFORK keeps it movable.
    """
    uffd, target, source = bench.open(), ANON.map(2), ANON.map(2)
    uffd.register(target)
    source.write(0, pattern(source))
    source.advise(Advice.DONTFORK, PAGE, PAGE)
    in_child(lambda: same(source.load(0), pattern(source)[0], "byte in the child"))
    with refused(16, what="MOVE after the child is gone"):
        uffd.move(target.address, source.address, PAGE)
    same(uffd.move(target.page(1), source.page(1), PAGE), PAGE, "MOVE of a DONTFORK page")
    source.store(0, 0x77)
    same(uffd.move(target.address, source.address, PAGE), PAGE, "MOVE once written")
    same((target.load(0), target.load(PAGE)), (0x77, pattern(source, 1, 1)[0]), "bytes moved")


@case("traps", on=["anon", "shmem"], needs=[feature(Feature.WP_ASYNC)], name="15-written-elsewhere")
def written_elsewhere(bench: Bench) -> None:
    """The scan reports WRITTEN outside write-protect registered mappings up to 7.2, and only inside
    them from 7.3 on: mask it by WPALLOWED.
    """
    memory = bench.map(2)
    memory.write(0, pattern(memory))
    end = memory.address + memory.length
    written = Category.WRITTEN
    with Pagemap() as pagemap:
        found = pagemap.scan(memory.address, end, mask=written, returned=written).regions
        masked = written | Category.WPALLOWED
        safe = pagemap.scan(memory.address, end, mask=masked, returned=masked).regions
    answer = "reported" if found else "not reported"
    bench.either(
        "WRITTEN in an unregistered range", answer, up_to_7_2="reported", from_7_3="not reported"
    )
    same(safe, (), "regions that are WRITTEN and WPALLOWED")


@case("traps", on=ALL, needs_of=mode(Mode.MISSING, Mode.WP), name="16-registering-with-fewer-modes")
def registering_with_fewer_modes(bench: Bench) -> None:
    """Registering again without WP replaces the mode up to 7.2 and is refused from 7.3 on:
    unregister first.
    """
    uffd, memory = bench.registered(Mode.MISSING | Mode.WP, pages=1)
    try:
        answer = uffd.register(memory, Mode.MISSING).ioctls
        result = "replaces the mode"
        same(Ioctls.WRITEPROTECT in answer, False, "WRITEPROTECT answered")
    except RangeOwnedElsewhere:
        result = "EBUSY"
    bench.either("REGISTER without WP", result, up_to_7_2="replaces the mode", from_7_3="EBUSY")
    uffd.unregister(memory)
    uffd.register(memory, Mode.MISSING)
    reader = loading(memory.address)
    expect(next_fault(uffd).is_missing, "a missing fault")
    uffd.copy(memory.address, bench.page(0))
    same(reader.join(), bench.page(0)[0], "byte read")


@case(
    "traps",
    needs=[feature(Feature.MOVE | Feature.POISON)],
    name="18-features-need-not-be-asked-for",
)
def features_need_not_be_asked_for(bench: Bench) -> None:
    """POISON and MOVE work on a context that did not ask for them: what was asked for says nothing
    about what is supported.
    """
    uffd, memory = bench.open(Feature.NONE), ANON.map(2)
    source = ANON.map(1)
    source.write(0, pattern(source))
    uffd.register(memory)
    same(uffd.move(memory.address, source.address, PAGE), PAGE, "bytes moved")
    same(uffd.poison(memory.page(1), PAGE), PAGE, "bytes poisoned")
    same(int(uffd.features), 0, "features asked for")


@case("traps", on=["shmem"], needs=_MOVE, name="18-move-is-over-promised")
def move_is_over_promised(bench: Bench) -> None:
    """REGISTER names MOVE on shared memory, where it is refused: its answer is not support."""
    uffd, memory = bench.open(), bench.map(1)
    answer = uffd.register(memory).ioctls
    bench.remark(f"MOVE named for shmem: {'yes' if Ioctls.MOVE in answer else 'no'}")
    source = ANON.map(1)
    source.write(0, pattern(source))
    with refused(22, what="MOVE to shared memory"):
        uffd.move(memory.address, source.address, PAGE)
