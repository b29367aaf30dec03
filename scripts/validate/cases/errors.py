"""Refusals: each cause provoked, each error as documented."""

import errno
import mmap
import os
import tempfile

from scripts.validate import raw
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, outcome, refused, refuses, same
from scripts.validate.host import feature, mode
from scripts.validate.kinds import ALL, ANON, HUGE, PAGE, SHARED, SHMEM, pattern
from uffd import (
    Advice,
    Feature,
    Mapping,
    MemfdFlag,
    Mode,
    Seal,
    file_system,
    madvise,
    memfd_create,
    punch_hole,
)
from uffd._native import lib
from uffd.files import add_seals

_MOVE = [feature(Feature.MOVE)]


@case("errors", name="register-arguments")
def register_arguments(bench: Bench) -> None:
    """Unknown mode bits, no mode, no length, odd addresses and unmapped ranges: EINVAL; a hole in
    the range is no error.
    """
    uffd, memory = bench.open(), ANON.map(4)
    for wanted in (Mode(0), Mode(1 << 6), Mode(1 << 40)):
        with refused(22, what=f"mode {int(wanted):#x}"):
            uffd.register(memory, wanted)
    for start, length in (
        (memory.address + 1, PAGE),
        (memory.address, PAGE + 1),
        (memory.address, 0),
    ):
        with refused(22, what=f"start +{start - memory.address}, length {length:#x}"):
            uffd.register(start, length)
    with refused(22, what="beyond the address space"):
        uffd.register(1 << 47, PAGE)
    raw.unmap(memory.page(1), PAGE)
    with refused(22, what="nothing mapped"):
        uffd.register(memory.page(1), PAGE)
    uffd.register(memory)
    same(uffd.copy(memory.page(2), bytes(PAGE)), PAGE, "COPY behind the hole")
    with refused(2, what="COPY into the hole"):
        uffd.copy(memory.page(1), bytes(PAGE))


def _disk_file() -> Mapping:
    fd, name = tempfile.mkstemp(prefix="validate-kernel-")
    os.unlink(name)
    os.ftruncate(fd, 4 * PAGE)
    return Mapping.of_file(fd, 4 * PAGE)


@case("errors", name="register-disk-file")
def register_disk_file(bench: Bench) -> None:
    """A mapping of a disk file: EINVAL for missing, minor and synchronous protection; asynchronous
    protection is for any memory.
    """
    memory = _disk_file()
    assert memory.fd is not None
    if file_system(memory.fd).is_shmem:
        raise Skipped("the temporary directory is in memory", "TMPDIR=/a/disk/directory")
    uffd = bench.open()
    for wanted in (Mode.MISSING, Mode.MINOR, Mode.WP):
        with refused(22, what=f"REGISTER {wanted!r}"):
            uffd.register(memory, wanted)
    if Feature.WP_ASYNC in bench.features:
        bench.open(Feature.WP_ASYNC).register(memory, Mode.WP)


@case("errors", name="register-secret")
def register_secret(bench: Bench) -> None:
    """memfd_secret: EINVAL."""
    fd = raw.syscall(raw.SYS_MEMFD_SECRET, 0)
    if fd < 0:
        raise Skipped("no memfd_secret here (secretmem.enable)")
    os.ftruncate(fd, PAGE)
    memory = Mapping.of_file(fd, PAGE)
    with refused(22, what="REGISTER"):
        bench.open().register(memory)


@case("errors", name="register-read-only")
def register_read_only(bench: Bench) -> None:
    """A shared mapping that can never be written (read-only fd, write seal): EPERM; a PROT_READ
    mapping of a writable fd is taken, and COPY fills it.
    """
    fd = memfd_create("validate", PAGE, flags=MemfdFlag.CLOEXEC | MemfdFlag.ALLOW_SEALING)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    view = Mapping.of_file(read_only, PAGE, protection=mmap.PROT_READ)
    uffd = bench.open()
    with refused(1, what="REGISTER of a read-only fd's mapping"):
        uffd.register(view)
    readable = Mapping.of_file(os.dup(fd), PAGE, protection=mmap.PROT_READ)
    uffd.register(readable)
    uffd.copy(readable.address, pattern(readable))
    same(readable.read(0, PAGE), pattern(readable), "contents of the read-only mapping")
    uffd.close()
    readable.close()
    add_seals(fd, Seal.WRITE)
    sealed = Mapping.of_file(fd, PAGE, protection=mmap.PROT_READ)
    with refused(1, what="REGISTER of a sealed memfd"):
        bench.open().register(sealed)


@case("errors", on=ALL, needs_of=mode(Mode.MISSING), name="copy")
def copy(bench: Bench) -> None:
    """COPY: unreadable source EFAULT; beyond the mapping ENOENT; write protection where it is not
    registered EINVAL.
    """
    uffd, memory = bench.registered(pages=2)
    size = memory.page_size
    source = Mapping.anonymous(size, protection=0)
    with refused(14, what="COPY from unreadable memory"):
        uffd.copy(memory.address, source.address, size)
    with refused(2, what="COPY across the end of the mapping"):
        uffd.copy(memory.page(1), bytes(2 * size))
    with refused(22, what="COPY with WP where that is not registered"):
        uffd.copy(memory.address, bytes(size), write_protect=True)
    same(uffd.copy(memory.address, bench.page(0)), size, "COPY that is right")
    bench.holds(memory, 0, bench.page(0))


@case("errors", on=["shmem", "hugetlb"], needs_of=mode(Mode.MINOR), name="continue")
def continue_(bench: Bench) -> None:
    """CONTINUE: no page in the file EFAULT; mapped already EEXIST; write protection where it is
    not registered EINVAL; the registered mode is not asked.
    """
    uffd, memory = bench.registered(Mode.MISSING, pages=2)
    size = memory.page_size
    with refused(14, what="CONTINUE of a page the file has not"):
        uffd.continue_(memory.address, size)
    memory.alias().write(0, bench.page(0))
    with refused(22, what="CONTINUE with WP where that is not registered"):
        uffd.continue_(memory.address, size, write_protect=True)
    same(uffd.continue_(memory.address, size), size, "CONTINUE on a range without MINOR")
    bench.holds(memory, 0, bench.page(0))
    with refused(17, what="CONTINUE of a mapped page"):
        uffd.continue_(memory.address, size)


@case("errors", on=["shmem", "hugetlb"], needs_of=mode(Mode.MISSING), name="beyond-the-file")
def beyond_the_file(bench: Bench) -> None:
    """COPY beyond the file's end is refused; hole punching and truncation report no event."""
    uffd, memory = bench.registered(features=Feature.EVENT_REMOVE, pages=2)
    size = memory.page_size
    uffd.copy(memory.address, pattern(memory))
    assert memory.fd is not None
    punch_hole(memory.fd, 0, size)
    os.ftruncate(memory.fd, size)
    same(uffd.read_events(), [], "events of hole and truncation")
    answer = outcome(lambda: uffd.copy(memory.page(1), bench.page(1)))
    if bench.kind.is_hugetlb:
        same(answer, "EFAULT", "COPY beyond the file's end")
    else:
        bench.either("COPY beyond the file's end", answer, up_to_7_2="EFAULT", from_7_3="ENOMEM")
    same(uffd.copy(memory.address, bench.page(0)), size, "COPY into the hole")


@case("errors", needs=_MOVE, name="move")
def move(bench: Bench) -> None:
    """MOVE: shared memory EINVAL; a source that is not writable or locked EINVAL; a target that
    has a page EEXIST; an unmapped source ENOENT.
    """
    uffd, target = bench.open(), ANON.map(2)
    uffd.register(target)
    shared, source = SHMEM.map(1), ANON.map(2)
    source.write(0, pattern(source))
    shared.write(0, pattern(shared))
    with refused(22, what="MOVE from shared memory"):
        uffd.move(target.address, shared.address, PAGE)
    locked = ANON.map(1)
    locked.store(0, 1)
    same(raw.lock(locked.address, PAGE), 0, "mlock")
    with refused(22, what="MOVE from locked memory"):
        uffd.move(target.address, locked.address, PAGE)
    read_only = ANON.map(1)
    read_only.store(0, 1)
    read_only.protect(mmap.PROT_READ)
    with refused(22, what="MOVE from read-only memory"):
        uffd.move(target.address, read_only.address, PAGE)
    with refused(2, what="MOVE from where nothing is mapped"):
        uffd.move(target.address, 1 << 46, PAGE)
    uffd.copy(target.address, pattern(target, 0, 1, salt=1))
    with refused(17, what="MOVE to a page that is there"):
        uffd.move(target.address, source.address, PAGE)
    same(uffd.move(target.page(1), source.page(1), PAGE), PAGE, "MOVE that is right")
    same(target.read(PAGE, PAGE), pattern(source, 1, 1), "contents moved")


@case("errors", on=SHARED, needs=_MOVE, needs_of=mode(Mode.MISSING), name="move-to-shared")
def move_to_shared(bench: Bench) -> None:
    """MOVE into shared memory is EINVAL, although REGISTER names it there for shmem."""
    uffd, memory = bench.registered(pages=1)
    source = bench.kind.map(1)
    source.write(0, bench.page(0))
    with refused(22, what="MOVE to shared memory"):
        uffd.move(memory.address, source.address, memory.page_size)
    bench.holds(source, 0, bench.page(0))


@case("errors", on=ALL, needs_of=mode(Mode.WP), name="write-protect")
def write_protect(bench: Bench) -> None:
    """WRITEPROTECT: protecting without a wake EINVAL, no length EINVAL, parts of huge pages
    EINVAL, not registered for protection ENOENT.
    """
    uffd, memory = bench.registered(Mode.WP, pages=2)
    size = memory.page_size
    got = lib.uffd_writeprotect(uffd.fileno(), memory.address, size, 3)
    same(got, -errno.EINVAL, "protecting with DONTWAKE")
    with refused(22, what="no length"):
        uffd.write_protect(memory.address, 0)
    with refused(22, what="an odd address"):
        uffd.write_protect(memory.address + 1, size)
    if bench.kind.is_hugetlb:
        with refused(22, what="part of a huge page"):
            uffd.write_protect(memory.address, HUGE // 2)
    other = bench.map(1)
    uffd.register(other, Mode.MISSING)
    with refused(2, what="registered for missing faults only"):
        uffd.write_protect(other)


@case("errors", name="wake")
def wake(bench: Bench) -> None:
    """WAKE: no length and odd addresses EINVAL; the registration is not asked."""
    uffd, memory = bench.open(), ANON.map(1)
    for start, length in ((memory.address, 0), (memory.address + 1, PAGE)):
        with refused(22, what=f"start +{start - memory.address}, length {length:#x}"):
            uffd.wake(start, length)
    uffd.wake(memory)
    expect(uffd.queue_depth().total == 0, "nobody waited")


@case("errors", name="small-buffer")
def small_buffer(bench: Bench) -> None:
    """read into less than a message: EINVAL; with nothing waiting: EAGAIN."""
    uffd, into = bench.open(), bytearray(64)
    at = raw.buffer_address(into)
    refuses(raw.syscall(raw.SYS_READ, uffd.fileno(), at, 31), 22, "read of 31 bytes")
    refuses(raw.syscall(raw.SYS_READ, uffd.fileno(), at, 32), 11, "read with nothing waiting")


@case("errors", name="advice")
def advice(bench: Bench) -> None:
    """Advice that does not fit its memory: EINVAL for REMOVE on anonymous and FREE on shared
    memory, COLLAPSE of less than a huge page, unknown numbers.
    """
    anon, shmem = ANON.map(4), SHMEM.map(4)
    for memory, wanted in (
        (anon, Advice.REMOVE),
        (shmem, Advice.FREE),
        (anon, Advice.COLLAPSE),
        (shmem, Advice.COLLAPSE),
    ):
        with refused(22, what=f"{wanted.name} on {'shmem' if memory.is_shared else 'anon'}"):
            memory.advise(wanted)

    with refused(22, what="advice 9999"):
        madvise(anon.address, PAGE, 9999)
