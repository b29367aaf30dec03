"""MOVE: pages change place without a copy."""

from scripts.validate import folios, raw
from scripts.validate.actors import running
from scripts.validate.bench import Bench, entry
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, same
from scripts.validate.host import feature, thp
from scripts.validate.kinds import HUGE, PAGE, aligned, pattern
from uffd import Advice, Feature, Mapping, PageFault, Userfaultfd
from uffd.events import Event

_NEEDS = [feature(Feature.MOVE)]


def _serve_by_moving(
    bench: Bench, target: Mapping, source: Mapping, unit: int, expected: bytes
) -> None:
    """Read every page of ``target``; each missing fault moves ``unit`` bytes from ``source``."""
    uffd = bench.open()
    uffd.register(target)

    def answer(context: Userfaultfd, event: Event) -> None:
        assert isinstance(event, PageFault)
        offset = (event.address - target.address) // unit * unit
        moved = context.move(target.address + offset, source.address + offset, unit)
        same(moved, unit, f"bytes moved to {offset:#x}")

    with running(uffd, answer) as server:
        got = b"".join(target.read(at, PAGE) for at in range(0, target.length, PAGE))
    same(got, expected, "contents that arrived")
    same(len(server.faults()), target.length // unit, "faults, one per unit")
    left = [at for at in range(0, source.length, PAGE) if entry(source.address + at).is_present]
    same(left, [], "source pages still present")


@case("unit", on=["anon"], needs=_NEEDS)
def move(bench: Bench) -> None:
    """A handler answers each missing fault by moving the page from a source range: the contents
    arrive, the source becomes absent, page by page.
    """
    target, source = bench.map(16), bench.map(16)
    expected = pattern(source)
    source.write(0, expected)
    _serve_by_moving(bench, target, source, PAGE, expected)


def _huge_source(offset: int) -> tuple[Mapping, bytes]:
    """Two huge pages' worth of memory in huge pages, and what it holds."""
    whole = aligned(2 * HUGE, HUGE)
    whole.advise(Advice.HUGEPAGE)
    expected = pattern(whole)
    whole.write(0, expected)
    if folios.anon_huge_bytes(whole.address) < 2 * HUGE:
        raise Skipped("the kernel found no huge page", "echo 1 > /proc/sys/vm/compact_memory")
    part = Mapping(whole.address + offset, HUGE, page_size=PAGE, fd=None, is_shared=False)
    return part, expected[offset : offset + HUGE]


@case("unit", on=["anon"], needs=[*_NEEDS, thp()])
def move_pmd(bench: Bench) -> None:
    """The same with a source and target aligned to huge pages: moved whole, still huge after."""
    source, expected = _huge_source(0)
    target = aligned(HUGE, HUGE)
    target.advise(Advice.HUGEPAGE)
    _serve_by_moving(bench, target, source, HUGE, expected)
    same(folios.anon_huge_bytes(target.address), HUGE, "mapped by huge pages at the target")


@case("unit", on=["anon"], needs=[*_NEEDS, thp()])
def move_pmd_split(bench: Bench) -> None:
    """The same with both sides half a huge page off: the huge page is split, contents arrive."""
    source, expected = _huge_source(HUGE // 2)
    target = aligned(HUGE, HUGE, offset=HUGE // 2)
    _serve_by_moving(bench, target, source, HUGE // 2, expected)
    same(folios.anon_huge_bytes(target.address), 0, "mapped by huge pages at the target")


@case("unit", on=["anon"], needs=_NEEDS)
def move_holes(bench: Bench) -> None:
    """A hole in the source stops MOVE with the count so far, and is an error of its own; with
    ALLOW_SRC_HOLES it counts as moved.
    """
    target, source = bench.map(4), bench.map(4)
    source.write(0, pattern(source, 0, 1))
    source.write(2 * PAGE, pattern(source, 2, 1))
    uffd = bench.open()
    uffd.register(target)
    words = (target.address, source.address, 4 * PAGE, 0)
    got = raw.place(uffd.fileno(), raw.MOVE, words)
    same(got, raw.Placed(11, PAGE), "MOVE up to a hole")
    hole = (target.page(1), source.page(1), 3 * PAGE, 0)
    same(raw.place(uffd.fileno(), raw.MOVE, hole), raw.Placed(2, -2), "MOVE from a hole")
    done = uffd.move(target.page(1), source.page(1), 3 * PAGE, allow_holes=True)
    same(done, 3 * PAGE, "MOVE with holes allowed")
    bench.holds(target, 0, pattern(source, 0, 1))
    bench.holds(target, 2, pattern(source, 2, 1))
    expect(not entry(target.page(1)).is_present, "the hole arrives as a hole")
