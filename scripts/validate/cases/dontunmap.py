"""mremap with MREMAP_DONTUNMAP: the old range stays mapped, and empty."""

from scripts.validate import raw
from scripts.validate.actors import loading, next_fault
from scripts.validate.bench import Bench, present
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, refuses, same
from scripts.validate.host import mode
from scripts.validate.kinds import PAGE, aligned, pattern
from uffd import Mapping, Mode, UffdError

_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4
_KINDS = ("anon", "shmem", "shmem-private")


def _move(memory: Mapping) -> Mapping:
    try:
        return memory.remap(keep_old=True)
    except UffdError as error:
        if memory.fd is not None and error.errno == 22:
            raise Skipped("DONTUNMAP is for anonymous memory only here (Linux 5.13)") from None
        raise


@case("dontunmap", on=_KINDS, name="simple")
def simple(bench: Bench) -> None:
    """The contents are at the new place; the old one is empty and usable."""
    memory = bench.map(4)
    memory.write(0, pattern(memory))
    moved = _move(memory)
    same(moved.read(0, moved.length), pattern(memory), "contents at the new place")
    same(present(memory), [False] * 4, "pages mapped at the old place")
    expected = pattern(memory)[:PAGE] if bench.variant == "shmem" else bytes(PAGE)
    same(memory.read(0, PAGE), expected, "contents at the old place")
    memory.store(1, 9)
    same(memory.load(1), 9, "byte written at the old place")


@case("dontunmap", on=["anon"], name="fixed")
def fixed(bench: Bench) -> None:
    """A target that is mapped already is replaced; the bytes around it stay."""
    memory = bench.map(2)
    memory.write(0, pattern(memory))
    target = bench.map(4)
    target.write(0, pattern(target, salt=1))
    flags = _MAYMOVE | _FIXED | _DONTUNMAP
    got = raw.remap(memory.address, memory.length, memory.length, flags, target.page(1))
    same(got, target.page(1), "mremap")
    same(target.read(PAGE, 2 * PAGE), pattern(memory), "contents at the target")
    bench.holds(target, 0, pattern(target, 0, 1, salt=1))
    bench.holds(target, 3, pattern(target, 3, 1, salt=1))
    same(memory.read(0, memory.length), bytes(memory.length), "contents at the old place")


@case("dontunmap", on=["anon"], name="part")
def part(bench: Bench) -> None:
    """Moving part of a mapping empties that part only."""
    memory = bench.map(4)
    memory.write(0, pattern(memory))
    got = raw.remap(memory.page(1), 2 * PAGE, 2 * PAGE, _MAYMOVE | _DONTUNMAP)
    expect(got > 0, "mremap")
    moved = Mapping(got, 2 * PAGE, page_size=PAGE, fd=None, is_shared=False)
    same(moved.read(0, 2 * PAGE), pattern(memory, 1, 2), "contents at the new place")
    same(present(memory), [True, False, False, True], "pages mapped at the old place")


@case("dontunmap", on=["anon"], name="sizes")
def sizes(bench: Bench) -> None:
    """Growing or shrinking while keeping the old range is refused, as is not allowing a move."""
    memory = bench.map(2)
    memory.write(0, pattern(memory))
    for new in (PAGE, 3 * PAGE):
        got = raw.remap(memory.address, 2 * PAGE, new, _MAYMOVE | _DONTUNMAP)
        refuses(got, 22, f"to {new:#x} bytes")
    refuses(raw.remap(memory.address, 2 * PAGE, 2 * PAGE, _DONTUNMAP), 22, "without MAYMOVE")
    same(memory.read(0, memory.length), pattern(memory), "contents")


@case("dontunmap", on=["anon"], name="hugetlb-aligned-old")
def at_an_alignment(bench: Bench) -> None:
    """Over two megabytes, at an aligned place: page tables move whole, contents the same."""
    length = 2 << 20
    memory = aligned(length, length)
    memory.write(0, pattern(memory))
    moved = memory.remap(keep_old=True)
    same(moved.read(0, length), pattern(memory), "contents at the new place")
    same(any(present(memory)), False, "pages mapped at the old place")


@case("dontunmap", on=["anon"], needs_of=mode(Mode.MISSING), name="makes-missing")
def makes_missing(bench: Bench) -> None:
    """The classic way to make a registered range missing at once: its next touch is reported."""
    uffd, memory = bench.registered(Mode.MISSING)
    uffd.copy(memory.address, pattern(memory))
    moved = memory.remap(keep_old=True)
    same(moved.read(0, moved.length), pattern(memory), "contents at the new place")
    reader = loading(memory.page(2) + 1)
    same(next_fault(uffd).address, memory.page(2), "address of the fault at the old place")
    uffd.copy(memory.page(2), moved.read(2 * PAGE, PAGE))
    same(reader.join(), pattern(memory, 2, 1)[1], "byte read at the old place")
