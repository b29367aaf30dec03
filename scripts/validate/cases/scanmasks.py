"""PAGEMAP_SCAN: which pages match the masks, and what is shown of them."""

import os
import tempfile

from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.cases.scanargs import ASYNC
from scripts.validate.check import Skipped, same
from scripts.validate.kinds import ANON, PAGE
from scripts.validate.tracking import Tracked
from uffd import Category, Mapping, Pagemap, touch

W, P, A, Z, F = (
    Category.WRITTEN,
    Category.PRESENT,
    Category.WPALLOWED,
    Category.PFNZERO,
    Category.FILE,
)
NONE = Category.NONE

# Pages of the probe: 0 clean, 1 written, 2 a clean hole, 3 a clean zero page.
_CLEAN, _WRITTEN, _HOLE, _ZERO = range(4)
# name: (mask, any_of, inverted, pages that match)
_MASKS: dict[str, tuple[Category, Category, Category, list[int]]] = {
    "written required": (W, NONE, NONE, [_WRITTEN]),
    "present required": (P, NONE, NONE, [_CLEAN, _WRITTEN, _ZERO]),
    "written and present required": (W | P, NONE, NONE, [_WRITTEN]),
    "written or zero page": (NONE, W | Z, NONE, [_WRITTEN, _ZERO]),
    "present, and written or zero page": (P, W | Z, NONE, [_WRITTEN, _ZERO]),
    "written excluded": (W, NONE, W, [_CLEAN, _HOLE, _ZERO]),
    "present excluded": (P, NONE, P, [_HOLE]),
    "present, written excluded": (P | W, NONE, W, [_CLEAN, _ZERO]),
    "absent or written": (NONE, P | W, P, [_WRITTEN, _HOLE]),
    "tracked required": (A, NONE, NONE, [_CLEAN, _WRITTEN, _HOLE, _ZERO]),
    "tracked excluded": (A, NONE, A, []),
    "of a file required": (F, NONE, NONE, []),
    "nothing required": (NONE, NONE, NONE, [_CLEAN, _WRITTEN, _HOLE, _ZERO]),
}


def _probe() -> Tracked:
    memory = ANON.map(4)
    memory.store(_CLEAN * PAGE, 1)
    memory.store(_WRITTEN * PAGE, 1)
    memory.load(_ZERO * PAGE)
    tracked = Tracked.of(memory, populate=False)
    tracked.write(_WRITTEN)
    return tracked


@case("scan", on=_MASKS, needs=[ASYNC], name="masks")
def masks(bench: Bench) -> None:
    """Exactly the pages that this combination of masks selects, among a clean page, a written
    page, a clean hole and a clean zero page.
    """
    mask, any_of, inverted, expected = _MASKS[bench.variant]
    tracked = _probe()
    result = tracked.pagemap.scan(
        tracked.address, tracked.end, mask=mask, any_of=any_of, inverted=inverted
    )
    found = [i for first, last in tracked.runs(result) for i in range(first, last)]
    same(found, expected, "pages that match")


@case("scan", needs=[ASYNC], name="masks-return")
def masks_return(bench: Bench) -> None:
    """Only categories of the return mask are shown, and neighbours merge where these are equal."""
    tracked = _probe()

    def shown(returned: Category) -> list[tuple[int, int, Category]]:
        found = tracked.scan(mask=NONE, returned=returned)
        runs = tracked.runs(found)
        return [(*run, r.categories) for run, r in zip(runs, found.regions, strict=True)]

    same(shown(W), [(0, 1, NONE), (1, 2, W), (2, 4, NONE)], "written")
    same(shown(A), [(0, 4, A)], "tracked")
    same(shown(P), [(0, 2, P), (2, 3, NONE), (3, 4, P)], "present")
    everything = shown(W | P | A | Z)
    expected = [(0, 1, P | A), (1, 2, W | P | A), (2, 3, A), (3, 4, P | A | Z)]
    same(everything, expected, "all categories")


@case("scan", needs=[ASYNC], name="mapped-file")
def mapped_file(bench: Bench) -> None:
    """Pages of a mapped disk file are FILE; plain reads through the mapping are no writes, plain
    stores are; write(2) to the file does not go through the page table.
    """
    fd, name = tempfile.mkstemp(prefix="validate-kernel-")
    os.unlink(name)
    os.pwrite(fd, bytes([3]) * (4 * PAGE), 0)
    memory = Mapping.of_file(fd, 4 * PAGE)
    touch.read(memory.address, memory.length)
    tracked = Tracked.of(memory, populate=False)
    result = tracked.scan(mask=P, returned=F)
    same([r.categories for r in result.regions], [F], "categories of the mapped file")
    touch.read(memory.address, memory.length)
    tracked.expect_written([], "after reading")
    tracked.write(2)
    tracked.expect_written([(2, 3)], "after a store")
    os.pwrite(fd, b"x", PAGE)
    tracked.expect_written([(2, 3)], "after write(2) to the file")


@case("scan", needs=[ASYNC], name="soft-dirty")
def soft_dirty(bench: Bench) -> None:
    """SOFT_DIRTY and PRESENT together: after clearing, only rewritten pages."""
    memory = ANON.map(4)
    touch.fill(memory.address, 1, memory.length)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("4")
    memory.store(2 * PAGE, 5)
    with Pagemap() as pagemap:
        if not any(e.is_soft_dirty for e in pagemap.entries(memory.address, 4)):
            raise Skipped("the kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")
        wanted = Category.SOFT_DIRTY | P
        end = memory.address + memory.length
        result = pagemap.scan(memory.address, end, mask=wanted, returned=wanted)
        found = [(r.start - memory.address) // PAGE for r in result.regions]
        same(found, [2], "pages dirty since the clearing")
