"""Write protection does not follow memory that mremap moves without the remap event."""

from scripts.validate import folios, raw
from scripts.validate.bench import Bench, entry
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, same
from scripts.validate.host import Need, feature, folio, gigantic, root, swap
from scripts.validate.kinds import GIGANTIC, HUGE, PAGE, aligned, aligned_file
from uffd import Advice, Feature, Mapping, Mode, memfd_create

_SIZES = {"4K": PAGE} | {f"{1 << i}K": 1 << (i + 10) for i in range(4, 11)} | {"2M": HUGE}
_TRIES = 8


def _variants() -> list[str]:
    found = [
        f"{memory}:{size}{swapped}"
        for memory in ("anon", "shmem")
        for size in _SIZES
        for swapped in ("", ":swapped")
    ]
    hugetlb = [f"{memory}:2M" for memory in ("hugetlb", "hugetlb-private")]
    return found + hugetlb


def _needs(variant: str) -> list[Need]:
    memory, size, *swapped = variant.split(":")
    wanted = [swap()] if swapped else []
    if memory.startswith("hugetlb") or size == "4K":
        return wanted
    return [*wanted, root(), folio(_SIZES[size], of_file=memory == "shmem")]


def _one_folio(bench: Bench, size: int) -> Mapping:
    """A mapping of exactly one folio of ``size``, written.

    :raises Skipped: the kernel gives other folios.
    """
    if bench.kind.is_hugetlb:
        memory = bench.map(1)
        memory.store(0, 1)
        return memory
    got = 0
    for _ in range(_TRIES if size > PAGE else 1):
        if bench.kind.is_file:
            memory = aligned_file(memfd_create("validate", size), size, size)
        else:
            memory = aligned(size, size)
            # Cut off from the rest: the kernel takes the largest size that fits the mapping.
            raw.unmap(memory.address - PAGE, PAGE)
            raw.unmap(memory.address + size, PAGE)
        if size > PAGE:
            memory.advise(Advice.HUGEPAGE)
        memory.store(0, 1)
        got = folios.folio_bytes(memory.address) if size > PAGE else PAGE
        if got == size:
            memory.write(0, bytes([7]) * size)
            return memory
    raise Skipped(f"the kernel gave a folio of {got} bytes", "echo 1 > /proc/sys/vm/compact_memory")


def _marks(address: int, length: int) -> list[bool]:
    return [entry(at).is_write_protected for at in range(address, address + length, PAGE)]


def _moved(bench: Bench, memory: Mapping, contents: bytes) -> None:
    uffd = bench.open()
    uffd.register(memory, Mode.WP)
    uffd.write_protect(memory)
    count = memory.length // PAGE
    if "swapped" in bench.modifiers:
        memory.advise(Advice.PAGEOUT)
        out = [
            at for at in range(0, memory.length, PAGE) if not entry(memory.address + at).is_present
        ]
        if len(out) < count:
            raise Skipped(f"the kernel swapped {len(out)} of {count} pages out")
    same(_marks(memory.address, memory.length), [True] * count, "marks before the move")
    moved = memory.remap()
    same(_marks(moved.address, moved.length), [False] * count, "marks after the move")
    same(moved.read(0, moved.length), contents, "contents")
    moved.store(0, 9)  # would sleep for ever if still protected
    same(moved.load(0), 9, "byte written")
    expect(not uffd.wait(0), "no message comes")


@case("mremap-wp", on=_variants(), needs=[feature(Feature.WP_HUGETLBFS_SHMEM)], needs_of=_needs)
def wp_across_mremap(bench: Bench) -> None:
    """A whole folio of this size is protected and each of its pages marked; after mremap without
    the remap event no page is marked, contents stay and writes pass.
    """
    size = HUGE if bench.kind.is_hugetlb else _SIZES[bench.modifiers[0]]
    memory = _one_folio(bench, size)
    _moved(bench, memory, memory.read(0, memory.length))


@case(
    "mremap-wp",
    on=["shared:1G", "private:1G"],
    needs=[feature(Feature.WP_HUGETLBFS_SHMEM), gigantic()],
    name="wp-across-mremap-gigantic",
    timeout_s=60,
)
def wp_across_mremap_gigantic(bench: Bench) -> None:
    """The same for a huge page of 1 GiB: the mark is on the first page's entry."""
    fd = memfd_create("validate", GIGANTIC, hugepage_size=GIGANTIC)
    shared = bench.variant.startswith("shared")
    memory = Mapping.of_file(fd, GIGANTIC, shared=shared)
    memory.store(0, 7)
    uffd = bench.open()
    uffd.register(memory, Mode.WP)
    uffd.write_protect(memory)
    expect(entry(memory.address).is_write_protected, "the mark is there before the move")
    room = aligned(GIGANTIC, GIGANTIC)
    moved = raw.remap(memory.address, GIGANTIC, GIGANTIC, 3, room.address)
    same(moved, room.address, "mremap")
    expect(not entry(moved).is_write_protected, "the mark is gone after the move")
