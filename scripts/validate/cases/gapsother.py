"""What the kernel's own tests leave out: collapse while registered, huge page addresses."""

from scripts.validate.actors import loading, next_fault
from scripts.validate.bench import Bench, present
from scripts.validate.case import case
from scripts.validate.check import expect, refused, same
from scripts.validate.folios import anon_huge_bytes
from scripts.validate.host import feature, mode, thp
from scripts.validate.kinds import ALL, HUGE, PAGE, aligned, aligned_file, pattern
from uffd import Advice, Feature, Mapping, Mode, madvise, memfd_create


def _two_megabytes(bench: Bench) -> Mapping:
    if bench.kind.is_file:
        memory = aligned_file(memfd_create("validate", HUGE), HUGE, HUGE)
    else:
        memory = aligned(HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)
    return memory


@case("gaps", on=["anon", "shmem"], needs=[thp()], name="10-collapse-while-registered")
@case("traps", on=["anon", "shmem"], needs=[thp()], name="17-collapse-while-registered")
def collapse_while_registered(bench: Bench) -> None:
    """COPY always places base pages, also where huge pages are advised; collapsing is refused with
    one page missing and allowed once all are there, while registered.
    """
    memory, uffd = _two_megabytes(bench), bench.open()
    uffd.register(memory)
    data = pattern(memory)
    same(uffd.copy(memory.address, data[:-PAGE]), HUGE - PAGE, "bytes placed")
    same(anon_huge_bytes(memory.address), 0, "mapped by huge pages after COPY")
    with refused(16, what="MADV_COLLAPSE with a hole"):
        memory.advise(Advice.COLLAPSE)
    uffd.copy(memory.address + HUGE - PAGE, data[-PAGE:])
    memory.advise(Advice.COLLAPSE)
    same(memory.read(0, HUGE), data, "contents")
    if not bench.kind.is_file:
        same(anon_huge_bytes(memory.address), HUGE, "mapped by huge pages after the collapse")


@case("gaps", on=ALL, needs_of=mode(Mode.MISSING), name="11-addresses")
@case("traps", on=ALL, needs_of=mode(Mode.MISSING), name="07-addresses")
def addresses(bench: Bench) -> None:
    """The address of a message is rounded down to the host page (hugetlb: the huge page), and
    COPY takes only whole ones.
    """
    uffd, memory = bench.registered(pages=2)
    offset = memory.page_size - 7
    reader = loading(memory.page(1) + offset)
    same(next_fault(uffd).address, memory.page(1), "address of the message")
    if bench.kind.is_hugetlb:
        with refused(22, what="COPY of a part of a huge page"):
            uffd.copy(memory.page(1), bytes(PAGE))
        with refused(22, what="REGISTER of a part of a huge page"):
            uffd.register(memory.page(0), PAGE)
    uffd.copy(memory.page(1), bench.page(1))
    same(reader.join(), bench.page(1)[offset], "byte read")


@case(
    "gaps",
    on=ALL,
    needs=[feature(Feature.EXACT_ADDRESS)],
    needs_of=mode(Mode.MISSING),
    name="11-exact-addresses",
)
def exact_addresses(bench: Bench) -> None:
    """With EXACT_ADDRESS the message names the very byte, on every memory type."""
    uffd, memory = bench.registered(features=Feature.EXACT_ADDRESS, pages=1)
    offset = memory.page_size - 7
    reader = loading(memory.address + offset)
    same(next_fault(uffd).address, memory.address + offset, "address of the message")
    uffd.copy(memory.address, bench.page(0))
    same(reader.join(), bench.page(0)[offset], "byte read")


@case("gaps", on=["hugetlb", "hugetlb-private"], name="11-dontneed-length")
def dontneed_length(bench: Bench) -> None:
    """DONTNEED on huge pages rounds the length down: less than one is silently nothing."""
    memory = bench.map(2)
    memory.write(0, pattern(memory))
    madvise(memory.address, HUGE - PAGE, Advice.DONTNEED)
    kept = present(memory)
    expect(kept[1], "the second page is there")
    bench.either("pages left by DONTNEED of less than one", kept[0], up_to_7_3=True)
    madvise(memory.address, HUGE + PAGE, Advice.DONTNEED)
    same(present(memory), [False, True], "pages left by DONTNEED of a bit more than one")
    same(memory.read(HUGE, HUGE), pattern(memory, 1, 1), "contents of the second page")
