"""Read/write protection (Linux 7.3): accesses to protected pages are seen, contents stay."""

import mmap
import os
import struct

from scripts.validate import raw
from scripts.validate.actors import loading, next_fault, storing
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import expect, refused, same
from scripts.validate.host import feature
from scripts.validate.kinds import ALL, pattern
from uffd import Advice, Category, Feature, Mapping, Mode, Pagemap, Userfaultfd

RWP = feature(Feature.RWP)
RWP_ASYNC = feature(Feature.RWP | Feature.RWP_ASYNC)
ASYNC = Feature.RWP | Feature.RWP_ASYNC


def protected(bench: Bench, features: Feature, pages: int = 4) -> tuple[Userfaultfd, Mapping]:
    """Memory with contents, every page read/write-protected."""
    uffd, memory = bench.open(features), bench.map(pages)
    memory.write(0, pattern(memory))
    uffd.register(memory, Mode.RWP)
    uffd.read_write_protect(memory)
    return uffd, memory


@case("rwp", on=ALL, needs=[RWP_ASYNC])
def rwp_async(bench: Bench) -> None:
    """In asynchronous mode protected pages are accessed again without any message, and their
    contents are kept.
    """
    uffd, memory = protected(bench, ASYNC)
    same(memory.read(0, memory.length), pattern(memory), "contents")
    memory.store(1, 5)
    same(memory.load(1), 5, "byte written")
    same(uffd.read_events(), [], "messages")


@case("rwp", on=ALL, needs=[RWP])
def rwp_sync(bench: Bench) -> None:
    """In synchronous mode an access blocks, a message with the RWP flag arrives, unprotecting
    resolves it.
    """
    uffd, memory = protected(bench, Feature.RWP)
    for i, write in enumerate((False, True)):
        address = memory.page(i)
        sleeper = storing(address, 9) if write else loading(address)
        fault = next_fault(uffd)
        same((fault.address, fault.is_read_write_protect), (address, True), "address, RWP flag")
        same(fault.is_write, write, "WRITE flag")
        uffd.read_write_unprotect(address, memory.page_size)
        got = sleeper.join("the access")
        if not write:
            same(got, pattern(memory)[0], "byte read")
    same(memory.load(memory.page_size), 9, "byte written")


@case("rwp", on=ALL, needs=[RWP_ASYNC])
def rwp_pagemap(bench: Bench) -> None:
    """After a protect round the scan for ACCESSED finds exactly the touched pages."""
    uffd, memory = protected(bench, ASYNC)
    size = memory.page_size
    memory.load(size)
    memory.store(3 * size, 1)
    with Pagemap() as pagemap:
        found = pagemap.scan(
            memory.address,
            memory.address + memory.length,
            mask=Category.ACCESSED,
            returned=Category.ACCESSED,
        ).regions
    touched = [(at - memory.address) // size for r in found for at in range(r.start, r.end, size)]
    same(touched, [1, 3], "pages accessed")
    same(uffd.read_events(), [], "messages")


@case("rwp", on=ALL, needs=[RWP])
def rwp_mprotect(bench: Bench) -> None:
    """Protection survives mprotect to none and back."""
    uffd, memory = protected(bench, Feature.RWP)
    memory.protect(0)
    memory.protect(mmap.PROT_READ | mmap.PROT_WRITE)
    sleeper = loading(memory.address)
    expect(next_fault(uffd).is_read_write_protect, "an RWP message after mprotect")
    uffd.read_write_unprotect(memory)
    same(sleeper.join("the reader"), pattern(memory)[0], "byte read")


@case("rwp", on=ALL, needs=[RWP_ASYNC])
def rwp_gup(bench: Bench) -> None:
    """Kernel access through page pinning (vmsplice) resolves by itself in asynchronous mode."""
    sys_vmsplice = 278
    uffd, memory = protected(bench, ASYNC)
    reader, writer = os.pipe()
    count = 64
    vector = struct.pack("<QQ", memory.address, count)
    same(raw.syscall(sys_vmsplice, writer, vector, 1, 0), count, "bytes spliced")
    same(os.read(reader, count), pattern(memory)[:count], "contents through the pipe")
    same(uffd.read_events(), [], "messages")


@case("rwp", on=ALL, needs=[RWP_ASYNC])
def rwp_async_toggle(bench: Bench) -> None:
    """Switching asynchronous off at run time makes accesses block, on again lets them pass and
    wakes who waits.
    """
    uffd, memory = protected(bench, ASYNC)
    same(memory.load(0), pattern(memory)[0], "byte read while asynchronous")
    uffd.set_mode(disable=Feature.RWP_ASYNC)
    uffd.read_write_protect(memory)
    sleeper = loading(memory.page(1))
    expect(next_fault(uffd).is_read_write_protect, "an RWP message while synchronous")
    uffd.set_mode(enable=Feature.RWP_ASYNC)
    same(sleeper.join("the reader"), pattern(memory, 1, 1)[0], "byte read once switched back")
    same(memory.load(2 * memory.page_size), pattern(memory, 2, 1)[0], "byte of another page")


@case("rwp", on=ALL, needs=[RWP])
def rwp_close(bench: Bench) -> None:
    """Pages are accessible after the fd was closed."""
    uffd, memory = protected(bench, Feature.RWP)
    sleeper = loading(memory.page(1))
    next_fault(uffd)
    uffd.close()
    same(sleeper.join("the reader"), pattern(memory, 1, 1)[0], "byte the waiter read")
    same(memory.read(0, memory.length), pattern(memory), "contents")


@case("rwp", on=ALL, needs=[RWP], name="rwp-wp-exclusive")
def rwp_wp_exclusive(bench: Bench) -> None:
    """Registering WP and RWP together is refused; RWP_ASYNC without RWP is refused."""
    uffd, memory = bench.open(Feature.RWP), bench.map(1)
    with refused(22, what="REGISTER WP with RWP"):
        uffd.register(memory, Mode.WP | Mode.RWP)
    with refused(22, what="handshake RWP_ASYNC without RWP"):
        bench.open(Feature.RWP_ASYNC)
    with refused(22, what="SET_MODE of another feature"):
        uffd.set_mode(enable=Feature.SIGBUS)
    with refused(22, what="SET_MODE with one bit in both words"):
        uffd.set_mode(enable=Feature.RWP_ASYNC, disable=Feature.RWP_ASYNC)


@case("rwp", on=ALL, needs=[RWP])
def rwp_dontneed(bench: Bench) -> None:
    """Only present pages are protected, and DONTNEED drops the protection."""
    uffd, memory = protected(bench, Feature.RWP)
    memory.advise(Advice.DONTNEED, 0, memory.page_size)
    # A shared file keeps its data, a private mapping of one shows the (empty) file again.
    kept = bench.kind.is_shared
    same(memory.load(0), pattern(memory)[0] if kept else 0, "byte read after DONTNEED")
    same(uffd.read_events(), [], "messages")
