"""Registration splits mappings at its ends, and what splits can merge again."""

from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import expect, outcome, same
from scripts.validate.folios import vm_flags
from scripts.validate.host import mode
from scripts.validate.kinds import KINDS, PAGE, pattern
from uffd import Mapping, Mode

_KINDS = ("anon", "shmem", "shmem-private")


def _bounds(memory: Mapping) -> list[int]:
    """Page indices where a mapping of the process begins inside ``memory``."""
    starts = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            start = int(line.split("-")[0], 16)
            if memory.address < start < memory.address + memory.length:
                starts.append((start - memory.address) // memory.page_size)
    return starts


@case("merge", on=_KINDS, needs_of=mode(Mode.MISSING), name="split-and-merge")
def split_and_merge(bench: Bench) -> None:
    """Registering the middle splits the mapping at both ends; unregistering merges it again."""
    uffd, memory = bench.open(), bench.map(8)
    same(_bounds(memory), [], "bounds before")
    uffd.register(memory.page(2), 3 * PAGE)
    same(_bounds(memory), [2, 5], "bounds once registered")
    expect("um" in vm_flags(memory.page(3)), "smaps flag of the registered part")
    expect("um" not in vm_flags(memory.page(6)), "smaps flag of the rest")
    uffd.unregister(memory.page(2), 3 * PAGE)
    same(_bounds(memory), [], "bounds once unregistered")
    memory.write(0, pattern(memory))
    same(memory.read(0, memory.length), pattern(memory), "contents")


@case("merge", on=_KINDS, needs_of=mode(Mode.MISSING, Mode.WP), name="same-registration")
def same_registration(bench: Bench) -> None:
    """Neighbours registered with the same context and mode are one mapping, with another mode
    two.
    """
    uffd, memory = bench.open(), bench.map(8)
    uffd.register(memory.page(0), 4 * PAGE)
    uffd.register(memory.page(4), 4 * PAGE)
    same(_bounds(memory), [], "bounds with equal modes")
    uffd.register(memory.page(4), 4 * PAGE, Mode.MISSING | Mode.WP)
    same(_bounds(memory), [4], "bounds with different modes")


@case("merge", on=_KINDS, needs_of=mode(Mode.MISSING), name="two-contexts")
def two_contexts(bench: Bench) -> None:
    """Neighbours of two contexts never merge; each context keeps to its own."""
    first, second, memory = bench.open(), bench.open(), bench.map(8)
    first.register(memory.page(0), 4 * PAGE)
    second.register(memory.page(4), 4 * PAGE)
    same(_bounds(memory), [4], "bounds between the contexts")
    bench.either(
        "UNREGISTER over both",
        outcome(lambda: first.unregister(memory)),
        up_to_6_12="succeeds",
        from_6_18="EINVAL",
    )
    second.register(memory.page(4), 4 * PAGE)
    first.close()
    same(_bounds(memory), [4], "bounds once the first is closed")
    expect("um" not in vm_flags(memory.page(0)), "the first part is not registered any more")


@case("merge", on=KINDS, needs_of=mode(Mode.MISSING), name="closing")
def closing(bench: Bench) -> None:
    """Closing the context merges everything again (but hugetlb, whose mappings never merge) and
    lets pages come as usual.
    """
    uffd, memory = bench.open(), bench.map(4)
    size = memory.page_size
    uffd.register(memory.page(1), 2 * size)
    same(_bounds(memory), [1, 3], "bounds once registered")
    uffd.close()
    same(_bounds(memory), [1, 3] if bench.kind.is_hugetlb else [], "bounds once closed")
    same(memory.read(0, memory.length), bytes(memory.length), "contents")
