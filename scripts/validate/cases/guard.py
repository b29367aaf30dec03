"""Guard regions: pages that may not be touched, without a mapping of their own."""

import os
import tempfile
from collections.abc import Callable

from scripts.validate import folios, raw
from scripts.validate.bench import Bench, entry
from scripts.validate.case import case
from scripts.validate.check import CheckFailed, Skipped, expect, refused, same
from scripts.validate.host import Need
from scripts.validate.kinds import ANON, HUGE, PAGE, SHMEM, SHMEM_PRIVATE, pattern
from uffd import Advice, Category, Mapping, Pagemap, UffdError, madvise, touch
from uffd.touch import AccessFault

_SIGSEGV, _MAPERR = 11, 1
PAGES = 8


def _file(shared: bool) -> Mapping:
    fd, name = tempfile.mkstemp(prefix="validate-kernel-")
    os.unlink(name)
    os.ftruncate(fd, PAGES * PAGE)
    return Mapping.of_file(fd, PAGES * PAGE, shared=shared)


MEMORIES: dict[str, Callable[[], Mapping]] = {
    "anon": lambda: ANON.map(PAGES),
    "shmem": lambda: SHMEM.map(PAGES),
    "shmem-private": lambda: SHMEM_PRIVATE.map(PAGES),
    "file": lambda: _file(True),
    "file-private": lambda: _file(False),
}
PRIVATE = ("anon", "shmem-private", "file-private")


def _why_not() -> Skipped | None:
    with ANON.map(1) as memory:
        try:
            memory.advise(Advice.GUARD_INSTALL)
        except UffdError:
            return Skipped("the kernel has no guard regions (Linux 6.13)")
    return None


GUARDS = Need("guard regions", lambda host: host.ask("guards", _why_not))


def fresh(bench: Bench) -> Mapping:
    """Memory with contents all over.

    :raises Skipped: no guards on this memory (files: Linux 6.15).
    """
    memory = MEMORIES[bench.variant.split(":")[0]]()
    memory.write(0, pattern(memory))
    return memory


def install(memory: Mapping, first: int, count: int = 1) -> None:
    """Guard host pages. :raises Skipped: not on this memory."""
    try:
        memory.advise(Advice.GUARD_INSTALL, first * PAGE, count * PAGE)
    except UffdError as error:
        if memory.fd is not None and error.errno == 22:
            raise Skipped("no guard regions in files (Linux 6.15)") from None
        raise


def remove(memory: Mapping, first: int, count: int = 1) -> None:
    memory.advise(Advice.GUARD_REMOVE, first * PAGE, count * PAGE)


def is_guarded(address: int, *, write: bool = False) -> bool:
    """Whether an access is stopped as a guard stops it. Use inside ``guarded_accesses``."""
    try:
        if write:
            touch.guarded_store(address, 0x11)
        else:
            touch.guarded_load(address)
    except AccessFault as fault:
        if (fault.signal, fault.code, fault.address) != (_SIGSEGV, _MAPERR, address):
            raise CheckFailed(f"a guard raises SIGSEGV SEGV_MAPERR there, not {fault}") from None
        return True
    return False


def expect_guards(memory: Mapping, expected: set[int], what: str, *, write: bool = False) -> None:
    """Exactly these pages stop accesses."""
    with touch.guarded_accesses():
        found = {i for i in range(memory.page_count) if is_guarded(memory.page(i), write=write)}
    same(found, expected, f"guarded pages {what}")


@case("guard", on=MEMORIES, needs=[GUARDS], name="install-remove")
def install_remove(bench: Bench) -> None:
    """A guarded page stops loads and stores with SIGSEGV SEGV_MAPERR, its neighbours do not;
    removing it leaves an empty page of anonymous memory, the file's page of a file.
    """
    memory = fresh(bench)
    install(memory, 3)
    expect_guards(memory, {3}, "for loads")
    expect_guards(memory, {3}, "for stores", write=True)
    remove(memory, 3)
    expect_guards(memory, set(), "after the removal")
    kept = bench.variant in ("shmem", "file")
    expected = pattern(memory, 3, 1) if kept else bytes(PAGE)
    same(memory.read(3 * PAGE, PAGE), expected, "contents of the page that was guarded")
    same(memory.read(4 * PAGE + 1, 8), pattern(memory, 4, 1)[1:9], "contents of its neighbour")


@case("guard", on=MEMORIES, needs=[GUARDS], name="several")
def several(bench: Bench) -> None:
    """Guards over ranges that overlap; installing twice and removing where there is none are
    no errors; removing part of a range leaves the rest.
    """
    memory = fresh(bench)
    install(memory, 1, 3)
    install(memory, 2, 4)
    expect_guards(memory, {1, 2, 3, 4, 5}, "after two overlapping ranges")
    remove(memory, 3, 1)
    expect_guards(memory, {1, 2, 4, 5}, "after removing one")
    remove(memory, 0, PAGES)
    remove(memory, 0, PAGES)
    expect_guards(memory, set(), "after removing everything twice")


@case("guard", on=MEMORIES, needs=[GUARDS], name="never-populated")
def never_populated(bench: Bench) -> None:
    """Guards may be put where nothing was ever mapped in."""
    memory = MEMORIES[bench.variant]()
    install(memory, 0, PAGES)
    expect_guards(memory, set(range(PAGES)), "over holes")
    remove(memory, 0, PAGES)
    same(memory.read(0, memory.length), bytes(memory.length), "contents after the removal")


@case("guard", on=MEMORIES, needs=[GUARDS], name="bad-arguments")
def bad_arguments(bench: Bench) -> None:
    """An address that is not aligned is refused; so is a range with an unmapped hole, whose mapped
    parts are guarded all the same.
    """
    memory = fresh(bench)
    install(memory, 7)
    with refused(22, what="GUARD_INSTALL at an odd address"):
        madvise(memory.address + 1, PAGE, Advice.GUARD_INSTALL)
    raw.unmap(memory.page(2), PAGE)
    with refused(12, what="GUARD_INSTALL over an unmapped page"):
        memory.advise(Advice.GUARD_INSTALL, PAGE, 3 * PAGE)
    with touch.guarded_accesses():
        expect(is_guarded(memory.page(1)), "the part before the hole is guarded")
        expect(is_guarded(memory.page(3)), "the part behind the hole is guarded")


@case("guard", on=MEMORIES, needs=[GUARDS], name="pagemap")
def pagemap_bit(bench: Bench) -> None:
    """Bit 58 of pagemap tells exactly the guarded pages; the scan has the GUARD category for
    them, where the kernel knows it.
    """
    memory = fresh(bench)
    install(memory, 2, 2)
    found = {i for i in range(PAGES) if entry(memory.page(i)).is_guard}
    if not found:
        raise Skipped("the kernel does not show guards in pagemap (Linux 6.15)")
    same(found, {2, 3}, "pages with the guard bit")
    end = memory.address + memory.length
    with Pagemap() as pagemap:
        try:
            guard = Category.GUARD
            regions = pagemap.scan(memory.address, end, mask=guard, returned=guard).regions
        except UffdError:
            bench.remark("the scan has no GUARD category")
            return
    same([(r.start, r.end) for r in regions], [(memory.page(2), memory.page(4))], "GUARD regions")
    bench.remark("the scan has the GUARD category")


@case("guard", on=MEMORIES, needs=[GUARDS], name="smaps-flag")
def smaps_flag(bench: Bench) -> None:
    """smaps shows a mapping that may have guards, where the kernel has the flag."""
    memory = fresh(bench)
    expect("gu" not in folios.vm_flags(memory.address), "no flag before")
    install(memory, 1)
    shown = "gu" in folios.vm_flags(memory.address)
    expect(entry(memory.page(1)).is_guard, "the guard is there")
    bench.remark(f"smaps flag of a mapping with guards: {'gu' if shown else 'none'}")


@case("guard", on=["hugetlb", "hugetlb-private"], needs=[GUARDS], name="not-on-hugetlb")
def not_on_hugetlb(bench: Bench) -> None:
    """Huge pages of a pool take no guards."""
    memory = bench.map(1)
    with refused(22, what="GUARD_INSTALL on hugetlb"):
        memory.advise(Advice.GUARD_INSTALL)
    memory.store(HUGE - 1, 1)
    same(memory.load(HUGE - 1), 1, "byte of the page")
