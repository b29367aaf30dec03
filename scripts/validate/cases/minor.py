"""Minor faults: the page cache has the page, the page table has not."""

from scripts.validate.actors import running
from scripts.validate.bench import Bench, marked
from scripts.validate.case import case
from scripts.validate.check import expect, refused, same
from scripts.validate.folios import smaps_field
from scripts.validate.host import feature, mode
from scripts.validate.kinds import HUGE, PAGE, SHARED, aligned_file, inverted, pattern
from uffd import Advice, Feature, Mapping, Mode, PageFault, Userfaultfd, memfd_create
from uffd.events import Event

_PAGES = 4


def _serve(
    bench: Bench,
    memory: Mapping,
    alias: Mapping,
    *,
    protect: bool = False,
    register: Mode = Mode.MINOR,
) -> tuple[Userfaultfd, list[PageFault]]:
    """Fill through the alias; answer each first touch by inverting the page and CONTINUE."""
    before = pattern(memory)
    alias.write(0, before)
    uffd = bench.open()
    uffd.register(memory, register)
    size = memory.page_size

    def answer(context: Userfaultfd, event: Event) -> None:
        assert isinstance(event, PageFault)
        offset = event.address - memory.address
        if event.is_write_protect:
            context.write_unprotect(event.address, size)
            return
        alias.write(offset, inverted(alias.read(offset, size)))
        same(context.continue_(event.address, size, write_protect=protect), size, "bytes mapped")

    with running(uffd, answer) as server:
        got = memory.read(0, memory.length)
        if protect:
            same(marked(memory), [True] * memory.page_count, "marks of continued pages")
            for i in range(memory.page_count):
                memory.store(i * size, 0xA0 + i)
    same(got, inverted(before), "contents as the handler changed them")
    faults = server.faults()
    same([f for f in faults if f.is_missing], [], "missing faults")
    minor = [f.address for f in faults if f.is_minor]
    expected = list(range(memory.address, memory.address + memory.length, size))
    same(sorted(minor), expected, "minor faults, one per page")
    return uffd, faults


def _both(bench: Bench) -> tuple[Mapping, Mapping]:
    memory = bench.map(_PAGES)
    return memory, memory.alias()


@case("unit", on=SHARED, needs_of=mode(Mode.MINOR))
def minor(bench: Bench) -> None:
    """Filled through an unregistered alias, every first touch of the registered view gives one
    MINOR message; the handler changes the contents and CONTINUEs; no missing fault.
    """
    memory, alias = _both(bench)
    uffd, _ = _serve(bench, memory, alias)
    with refused(17, what="CONTINUE of a mapped page"):
        uffd.continue_(memory.address, memory.page_size)


# CONTINUE's WP mode has no feature bit of its own; it came with this one (Linux 6.4).
@case(
    "unit",
    on=SHARED,
    needs=[feature(Feature.WP_UNPOPULATED)],
    needs_of=mode(Mode.MINOR, Mode.WP),
)
def minor_wp(bench: Bench) -> None:
    """As minor; CONTINUE maps the page protected, and the write that follows gives a WP
    message.
    """
    memory, alias = _both(bench)
    _, faults = _serve(bench, memory, alias, protect=True, register=Mode.MINOR | Mode.WP)
    wp = [f.address for f in faults if f.is_write_protect]
    same(wp, [memory.page(i) for i in range(_PAGES)], "write-protect faults, one per page")
    firsts = [memory.load(i * memory.page_size) for i in range(_PAGES)]
    same(firsts, [0xA0 + i for i in range(_PAGES)], "bytes written")


@case("unit", on=["shmem"], needs=[feature(Feature.MINOR_SHMEM)])
def minor_collapse(bench: Bench) -> None:
    """As minor over 2 MiB of shmem; then MADV_COLLAPSE maps a huge page and the contents stay."""
    fd = memfd_create("validate", HUGE)
    memory = aligned_file(fd, HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)  # where huge pages of files are for advised mappings only
    alias = memory.alias()
    _serve(bench, memory, alias)
    memory.advise(Advice.COLLAPSE)
    expect(smaps_field(memory.address, "ShmemPmdMapped") == HUGE, "one huge page is mapped")
    same(memory.read(0, HUGE), inverted(pattern(memory)), "contents after the collapse")
    same(memory.page_size, PAGE, "host page")
