"""A page that becomes dirty without being writable stays unwritable."""

import mmap
import os

from scripts.validate import folios
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, outcome, same
from scripts.validate.host import mode, thp
from scripts.validate.kinds import HUGE, KINDS, PAGE, aligned, pattern
from uffd import Advice, Mapping, Mode, touch
from uffd.touch import AccessFault

_SIGSEGV, _ACCERR = 11, 2


def _stays_unwritable(address: int, expected: int, what: str) -> None:
    with touch.guarded_accesses():
        same(touch.guarded_load(address)[0], expected, f"{what}: byte")
        try:
            touch.guarded_store(address, expected ^ 0xFF)
        except AccessFault as fault:
            same((fault.signal, fault.code), (_SIGSEGV, _ACCERR), f"{what}: signal of a store")
        else:
            expect(False, f"{what}: a store to read-only memory is stopped")
        same(touch.guarded_load(address)[0], expected, f"{what}: byte after the store")


def _write_by_force(address: int, data: bytes) -> None:
    """As a debugger writes: past the protection of a private mapping."""
    fd = os.open("/proc/self/mem", os.O_RDWR)
    try:
        same(os.pwrite(fd, data, address), len(data), "bytes written through /proc/self/mem")
    except OSError as error:
        raise Skipped(f"forced writes are switched off here: {error}") from None
    finally:
        os.close(fd)


def _huge() -> Mapping:
    memory = aligned(HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)
    memory.write(0, bytes([5]) * HUGE)
    if not folios.anon_huge_bytes(memory.address):
        raise Skipped("the kernel found no huge page", "echo 1 > /proc/sys/vm/compact_memory")
    return memory


@case("mkdirty", on=["anon"], name="forced-write")
def forced_write(bench: Bench) -> None:
    """A base page written by force while read-only."""
    memory = bench.map(1)
    memory.store(0, 1)
    memory.protect(mmap.PROT_READ)
    _write_by_force(memory.address, b"\x42")
    _stays_unwritable(memory.address, 0x42, "base page")


@case("mkdirty", on=["anon"], needs=[thp()], name="forced-write-huge")
def forced_write_huge(bench: Bench) -> None:
    """A huge page written by force while read-only."""
    memory = _huge()
    memory.protect(mmap.PROT_READ)
    _write_by_force(memory.address + 3 * PAGE, b"\x42")
    _stays_unwritable(memory.address + 3 * PAGE, 0x42, "huge page")


@case("mkdirty", on=["anon"], needs=[thp()], name="split-huge")
def split_huge(bench: Bench) -> None:
    """A dirty huge page that became read-only and is then split by a change in its middle."""
    memory = _huge()
    memory.protect(mmap.PROT_READ)
    part = Mapping(memory.page(8), PAGE, page_size=PAGE, fd=None, is_shared=False)
    part.protect(mmap.PROT_READ | mmap.PROT_WRITE)
    same(folios.anon_huge_bytes(memory.address), 0, "mapped by huge pages after the split")
    _stays_unwritable(memory.address, 5, "page of the part that is read-only")
    part.store(0, 6)
    same(part.load(0), 6, "byte of the writable page")


@case("mkdirty", on=["anon"], needs=[thp()], name="collapse")
def collapse(bench: Bench) -> None:
    """Dirty base pages that became read-only, collapsed into a huge page."""
    memory = aligned(HUGE, HUGE)
    memory.advise(Advice.NOHUGEPAGE)
    memory.write(0, bytes([5]) * HUGE)
    memory.advise(Advice.HUGEPAGE)
    memory.protect(mmap.PROT_READ)
    bench.either(
        "MADV_COLLAPSE of read-only pages",
        outcome(lambda: memory.advise(Advice.COLLAPSE)),
        up_to_6_12="EINVAL",
        from_6_18="succeeds",
    )
    _stays_unwritable(memory.address + PAGE, 5, "collapsed page")


@case("mkdirty", on=KINDS, needs_of=mode(Mode.MISSING), name="copy")
def copy(bench: Bench) -> None:
    """A page placed by COPY in read-only memory."""
    uffd, memory = bench.open(), bench.map(1)
    memory.protect(mmap.PROT_READ)
    uffd.register(memory, Mode.MISSING)
    uffd.copy(memory.address, pattern(memory))
    _stays_unwritable(memory.address, pattern(memory)[0], "page placed")


@case("mkdirty", on=["anon"], name="advice-pageout")
def swapped_in(bench: Bench) -> None:
    """A dirty page that became read-only and is advised to go (swapped where there is swap)."""
    memory = bench.map(1)
    memory.store(0, 7)
    memory.protect(mmap.PROT_READ)
    memory.advise(Advice.PAGEOUT)
    _stays_unwritable(memory.address, 7, "page that was away")
