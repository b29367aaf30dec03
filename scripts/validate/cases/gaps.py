"""What the kernel's own tests leave out: waking, duplicates, output fields, silent losses.

The same behaviours are traps to whoever writes a fault handler, so each is in that family too.
"""

import errno

from guestmem.pools import HugepagePool
from scripts.validate import hugemount, raw
from scripts.validate.actors import (
    PATIENCE_S,
    Channel,
    Sleeper,
    Subject,
    loading,
    next_event,
    next_fault,
    storing,
)
from scripts.validate.bench import Bench, marked
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, same
from scripts.validate.host import hugepages, mode, root
from scripts.validate.kinds import ALL, ANON, GIGANTIC, HUGE, PAGE, SHARED, pattern
from scripts.validate.raw import Placed
from uffd import (
    Advice,
    Feature,
    Mapping,
    Mode,
    Userfaultfd,
    memfd_create,
    mincore,
)

_EEXIST, _EAGAIN, _EINVAL = errno.EEXIST, errno.EAGAIN, errno.EINVAL


def waiters(uffd: Userfaultfd) -> int:
    """Threads asleep on a page of the context, as the kernel counts them."""
    return uffd.queue_depth().total


def copy_to(uffd: Userfaultfd, address: int, data: bytes, flags: int = 0) -> Placed:
    """A COPY as the kernel answers it."""
    buffer = bytearray(data)
    words = (address, raw.buffer_address(buffer), len(data), flags)
    return raw.place(uffd.fileno(), raw.COPY, words)


@case("gaps", needs=[hugepages(), root()], name="01-dry-hugetlb-pool")
@case("traps", needs=[hugepages(), root()], name="01-dry-hugetlb-pool")
def dry_hugetlb_pool(bench: Bench) -> None:
    """COPY to a 2 MiB page when the pool has none left (here: a hugetlb mount of one page) says
    "exists" although nothing is there, from 6.18 on (6.12: no memory).
    """
    fd = hugemount.file_of_limited_mount(limit=HUGE, length=2 * HUGE)
    memory = Mapping.of_file(fd, 2 * HUGE, reserve=False)
    uffd = bench.open()
    uffd.register(memory)
    same(copy_to(uffd, memory.page(0), pattern(memory, 0, 1)), Placed(0, HUGE), "the one page")
    got = copy_to(uffd, memory.page(1), pattern(memory, 1, 1))
    same(mincore(memory.page(1), PAGE), b"\0", "residency of the page that was not to be had")
    known = {"EEXIST": Placed(_EEXIST, -_EEXIST), "ENOMEM": Placed(errno.ENOMEM, -errno.ENOMEM)}
    answer = next((name for name, value in known.items() if value == got), str(got))
    bench.either("COPY from an empty pool", answer, up_to_6_12="ENOMEM", from_6_18="EEXIST")


@case("gaps", name="01-dry-gigantic-pool")
def dry_gigantic_pool(bench: Bench) -> None:
    """The same for 1 GiB pages: there the answer is ENOMEM already."""
    pool = HugepagePool(GIGANTIC)
    if not pool.exists or pool.state().available:
        raise Skipped("there is no empty pool of 1 GiB pages")
    fd = memfd_create("validate", GIGANTIC, hugepage_size=GIGANTIC)
    memory = Mapping.of_file(fd, GIGANTIC, reserve=False)
    # The page is asked for before the source is read, so the source may be untouched.
    source = Mapping.anonymous(GIGANTIC)
    uffd = bench.open()
    uffd.register(memory)
    got = raw.place(uffd.fileno(), raw.COPY, (memory.address, source.address, GIGANTIC, 0))
    expect(got.error in (_EEXIST, errno.ENOMEM), f"COPY is refused for want of a page ({got})")
    same(got.output, -got.error, "output field")
    bench.remark(f"COPY from an empty pool of 1 GiB pages: {errno.errorcode[got.error]}")


@case("gaps", on=ALL, needs_of=mode(Mode.MISSING, Mode.WP), name="02-unregister-and-waiters")
@case("traps", on=ALL, needs_of=mode(Mode.MISSING, Mode.WP), name="04-unregister-wakes-no-wp")
def unregister_and_wp_waiters(bench: Bench) -> None:
    """UNREGISTER wakes who waits for a missing page, and leaves who waits to write a page of a
    range registered for protection only asleep until WAKE.
    """
    uffd, memory = bench.open(), bench.map(2)
    size = memory.page_size
    memory.write(0, bench.page(0))
    uffd.register(memory.page(0), size, Mode.WP)
    uffd.register(memory.page(1), size, Mode.MISSING)
    uffd.write_protect(memory.address, size)
    writer = storing(memory.address, 5)
    expect(next_fault(uffd).is_write_protect, "a write-protect fault")
    reader = loading(memory.page(1))
    expect(next_fault(uffd).is_missing, "a missing fault")
    uffd.unregister(memory.page(1), size, wake=False)
    same(reader.join("the reader of the missing page"), 0, "byte read")
    uffd.unregister(memory.address, size, wake=False)
    same(waiters(uffd), 1, "waiters after UNREGISTER")
    expect(writer.is_asleep, "the writer sleeps on")
    uffd.wake(memory.address, size)
    writer.join("the writer, once woken")
    same((memory.load(0), marked(memory)[0]), (5, False), "byte and mark")


@case("gaps", on=SHARED, needs_of=mode(Mode.MINOR), name="02-unregister-and-minor-waiters")
@case("traps", on=SHARED, needs_of=mode(Mode.MINOR), name="04-unregister-wakes-no-minor")
def unregister_and_minor_waiters(bench: Bench) -> None:
    """UNREGISTER leaves who waits in a minor fault asleep until WAKE."""
    memory = bench.map(1)
    memory.alias().write(0, bench.page(0))
    uffd = bench.open()
    uffd.register(memory, Mode.MINOR)
    reader = loading(memory.address)
    expect(next_fault(uffd).is_minor, "a minor fault")
    uffd.unregister(memory, wake=False)
    same(waiters(uffd), 1, "waiters after UNREGISTER")
    expect(reader.is_asleep, "the reader sleeps on")
    uffd.wake(memory)
    same(reader.join("the reader, once woken"), bench.page(0)[0], "byte read")


@case("gaps", on=SHARED, needs_of=mode(Mode.MINOR), name="03-minor-alone")
@case("traps", on=SHARED, needs_of=mode(Mode.MINOR), name="03-minor-alone")
def minor_alone(bench: Bench) -> None:
    """With MINOR alone a page absent from the file too is filled with zeros and nobody is told;
    with MISSING it is reported.
    """
    memory, uffd = bench.map(2), bench.open()
    uffd.register(memory, Mode.MINOR)
    same(memory.load(0), 0, "byte of a page that was never filled")
    same(uffd.read_events(), [], "messages")
    uffd.register(memory, Mode.MISSING | Mode.MINOR)
    reader = loading(memory.page(1))
    expect(next_fault(uffd).is_missing, "a missing fault with MISSING|MINOR")
    uffd.copy(memory.page(1), bench.page(1))
    same(reader.join(), bench.page(1)[0], "byte read")


@case("gaps", on=ALL, needs_of=mode(Mode.MISSING), name="04-exists-does-not-wake")
@case("traps", on=ALL, needs_of=mode(Mode.MISSING), name="02-exists-does-not-wake")
def exists_does_not_wake(bench: Bench) -> None:
    """A COPY that says "exists" wakes nobody; WAKE afterwards does."""
    uffd, memory = bench.registered(pages=1)
    reader = loading(memory.address)
    next_fault(uffd)
    uffd.copy(memory.address, bench.page(0), wake=False)
    same(copy_to(uffd, memory.address, bench.page(0)), Placed(_EEXIST, -_EEXIST), "COPY again")
    same(waiters(uffd), 1, "waiters afterwards")
    expect(reader.is_asleep, "the reader sleeps on")
    uffd.wake(memory)
    same(reader.join("the reader, once woken"), bench.page(0)[0], "byte read")


@case("gaps", on=ALL, needs_of=mode(Mode.MISSING), name="05-copy-through-another-context")
def copy_through_another_context(bench: Bench) -> None:
    """COPY through a context that does not own the range succeeds and wakes nobody."""
    uffd, memory = bench.registered(pages=1)
    other = bench.open()
    reader = loading(memory.address)
    next_fault(uffd)
    got = copy_to(other, memory.address, bench.page(0))
    same(got, Placed(0, memory.page_size), "COPY through the other context")
    same(waiters(uffd), 1, "waiters afterwards")
    uffd.wake(memory)
    same(reader.join("the reader, once woken"), bench.page(0)[0], "byte read")


@case("gaps", on=ALL, needs_of=mode(Mode.MISSING), name="06-output-fields")
@case("traps", on=ALL, needs_of=mode(Mode.MISSING), name="06-output-untouched")
def output_fields(bench: Bench) -> None:
    """The output field is the count of a partial success, minus the error where nothing was done,
    and untouched after an argument error.
    """
    uffd, memory = bench.registered()
    size = memory.page_size
    uffd.copy(memory.page(2), bench.page(2))
    got = copy_to(uffd, memory.address, pattern(memory))
    same(got, Placed(_EAGAIN, 2 * size), "COPY up to a page that is there")
    same(copy_to(uffd, memory.page(2), bench.page(2)), Placed(_EEXIST, -_EEXIST), "COPY on it")
    untouched = Placed(_EINVAL, raw.PRESET)
    same(copy_to(uffd, memory.page(3), bench.page(3), 1 << 7), untouched, "COPY, unknown mode")
    same(copy_to(uffd, memory.page(3) + 1, bench.page(3)), untouched, "COPY, odd address")
    empty = raw.place(uffd.fileno(), raw.COPY, (memory.page(3), memory.page(0), 0, 0))
    same(empty, untouched, "COPY of nothing")
    other = bench.map(1)
    nowhere = copy_to(uffd, other.address, bench.page(0))
    same(nowhere, Placed(errno.ENOENT, -errno.ENOENT), "COPY where nothing is registered")
    bench.holds(memory, 1, bench.page(1))


@case("traps", on=ALL, needs_of=mode(Mode.MISSING), name="05-again-means-two-things")
def again_means_two_things(bench: Bench) -> None:
    """EAGAIN with a count: go on from there, and learn the real reason; EAGAIN with minus the
    error: an event waits to be read, retry the same afterwards.
    """
    if Feature.EVENT_REMOVE not in bench.features:
        raise Skipped("the kernel does not report EVENT_REMOVE")
    uffd, memory = bench.registered(features=Feature.EVENT_REMOVE)
    size = memory.page_size
    uffd.copy(memory.page(1), bench.page(1))
    got = copy_to(uffd, memory.address, pattern(memory))
    same(got, Placed(_EAGAIN, size), "COPY up to a page that is there")
    real = copy_to(uffd, memory.page(1), pattern(memory, 1))
    same(real, Placed(_EEXIST, -_EEXIST), "COPY from there")
    remover = Sleeper(lambda: memory.advise(Advice.DONTNEED, size, size))
    expect(uffd.wait(PATIENCE_S), "an event waits")
    pending = copy_to(uffd, memory.page(2), bench.page(2))
    same(pending, Placed(_EAGAIN, -_EAGAIN), "COPY while an event waits")
    next_event(uffd)
    remover.join("DONTNEED")
    same(copy_to(uffd, memory.page(2), bench.page(2)), Placed(0, size), "the same COPY afterwards")


@case("gaps", name="06-dead-process")
def dead_process(bench: Bench) -> None:
    """Once the process is gone every operation says so and leaves the output field alone; reading
    finds nothing.
    """

    def body(channel: Channel) -> int:
        memory, uffd = ANON.map(1), bench.open()
        uffd.register(memory)
        channel.say("uffd", [uffd.fileno()])
        return memory.address

    subject = Subject(body)
    uffd = subject.uffd()
    address = subject.result()
    assert isinstance(address, int)
    gone = Placed(errno.ESRCH, raw.PRESET)
    same(copy_to(uffd, address, bytes(PAGE)), gone, "COPY")
    for name, number in (("ZEROPAGE", raw.ZEROPAGE), ("POISON", raw.POISON)):
        got = raw.place(uffd.fileno(), number, (address, PAGE, 0))
        same(got, gone, name)
    same(uffd.read_events(), [], "messages")


@case("gaps", name="07-two-waiters")
def two_waiters(bench: Bench) -> None:
    """Two threads on one page give two messages, with their own thread ids; one COPY wakes both."""
    memory, uffd = ANON.map(1), bench.open(Feature.THREAD_ID)
    uffd.register(memory)
    readers = [loading(memory.address + i) for i in range(2)]
    faults = [next_fault(uffd), next_fault(uffd)]
    same([f.address for f in faults], [memory.address] * 2, "addresses")
    same({f.thread_id for f in faults}, {r.thread.native_id for r in readers}, "thread ids")
    data = pattern(memory)
    uffd.copy(memory.address, data)
    same([r.join() for r in readers], list(data[:2]), "bytes read")
