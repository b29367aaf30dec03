"""MADV_POPULATE_READ and _WRITE: prefaulting, and what is in the way of it."""

import mmap

from scripts.validate import raw
from scripts.validate.bench import Bench, entry
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, refused, same
from scripts.validate.host import Need
from scripts.validate.kinds import ANON, KINDS, PAGE
from uffd import Advice, Mapping, UffdError

_PAGES = 6
_READ, _WRITE = Advice.POPULATE_READ, Advice.POPULATE_WRITE
_HOLES = {"first": 0, "middle": 3, "last": _PAGES - 1}
_MEMORIES = ("anon", "shmem", "shmem-private")


def _why_not() -> Skipped | None:
    with ANON.map(1) as memory:
        try:
            memory.advise(_READ)
        except UffdError:
            return Skipped("the kernel has no MADV_POPULATE_READ (Linux 5.14)")
    return None


_POPULATE = Need("populate", lambda host: host.ask("populate", _why_not))


def _advice(bench: Bench) -> Advice:
    return _READ if bench.modifiers[0] == "read" else _WRITE


def _present(memory: Mapping) -> list[bool]:
    return [entry(memory.address + i * PAGE).is_present for i in range(memory.length // PAGE)]


@case(
    "populate",
    on=[f"anon:{a}:{p}" for a in ("read", "write") for p in ("none", "read", "write")],
    needs=[_POPULATE],
)
def protection(bench: Bench) -> None:
    """Populating needs the access it stands for: refused where the protection forbids it, and
    nothing is populated then.
    """
    allowed = {"none": 0, "read": mmap.PROT_READ, "write": mmap.PROT_WRITE}[bench.modifiers[1]]
    memory = Mapping.anonymous(_PAGES * PAGE, protection=allowed)
    if bench.modifiers[0] == bench.modifiers[1]:
        memory.advise(_advice(bench))
        same(_present(memory), [True] * _PAGES, "pages present")
        return
    with refused(22, 14, what=f"populating for {bench.modifiers[0]} where that is forbidden"):
        memory.advise(_advice(bench))
    same(_present(memory), [False] * _PAGES, "pages present")


@case(
    "populate",
    on=[f"anon:{a}:{h}" for a in ("read", "write") for h in _HOLES],
    needs=[_POPULATE],
)
def holes(bench: Bench) -> None:
    """An unmapped page at this place of the range is ENOMEM; the pages before it are there.

    A page more on either side: a hole of one page is too small for what else is mapped meanwhile.
    """
    memory = ANON.map(_PAGES + 2)
    hole = _HOLES[bench.modifiers[1]]
    raw.unmap(memory.page(1 + hole), PAGE)
    with refused(12, what="populating over a hole"):
        memory.advise(_advice(bench), PAGE, _PAGES * PAGE)
    before = [entry(memory.page(1 + i)).is_present for i in range(hole)]
    same(before, [True] * hole, "pages before the hole")


@case(
    "populate",
    on=[f"{m}:{a}" for m in _MEMORIES for a in ("read", "write")],
    needs=[_POPULATE],
)
def pagemap(bench: Bench) -> None:
    """Afterwards every page of the range is present, no page beside it, contents are zeros and
    stay what was written.
    """
    memory = KINDS[bench.variant.split(":")[0]].map(_PAGES)
    memory.advise(_advice(bench), PAGE, 3 * PAGE)
    same(_present(memory), [False, True, True, True, False, False], "pages present")
    memory.store(2 * PAGE, 7)
    memory.advise(_advice(bench))
    same(_present(memory), [True] * _PAGES, "pages present after populating all")
    expected = bytes(2 * PAGE) + b"\7" + bytes(memory.length - 2 * PAGE - 1)
    same(memory.read(0, memory.length), expected, "contents")


@case("populate", on=["anon"], needs=[_POPULATE], name="write-is-exclusive")
def write_is_exclusive(bench: Bench) -> None:
    """Populating for reading maps the shared zero page, for writing a page of one's own."""
    memory = bench.map(2)
    memory.advise(_READ, 0, PAGE)
    memory.advise(_WRITE, PAGE, PAGE)
    expect(not entry(memory.page(0)).is_exclusive, "the page to read is shared")
    expect(entry(memory.page(1)).is_exclusive, "the page to write is our own")
    memory.advise(_WRITE, 0, PAGE)
    expect(entry(memory.page(0)).is_exclusive, "populating for writing replaces the zero page")
