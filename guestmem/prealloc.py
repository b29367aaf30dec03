"""Making all of a block's pages exist at the start: a shortage is an error then, not a SIGBUS
later."""

import errno
import threading
from collections.abc import Callable, Sequence

from guestmem._native import ffi, lib
from guestmem.errors import GuestMemoryError
from guestmem.geometry import format_size
from guestmem.ramblock import RAMBlock
from guestmem.shortage import explain_shortage
from uffd.threads import NamedThread

THREADS_MAX = 64
_REPORT_S = 0.5

#: ``progress(done, total)`` in bytes, from the caller's thread.
ProgressListener = Callable[[int, int], None]


def preallocate(
    block: RAMBlock, *, threads: int = 1, progress: ProgressListener | None = None
) -> None:
    """Populate every page of a block; contents stay as they are.

    The work is done natively without the GIL, by ``threads`` threads that take parts in turn (the
    kernel zeroes pages on whoever touches them). Blocks until all are done.

    :param progress: called about twice a second, and at the end.
    :raises ValueError: fewer than one thread, or more than :data:`THREADS_MAX`.
    :raises HugepagesShort: the pool, a node or a cgroup has too few huge pages; says which.
    :raises GuestMemoryError: anything else the kernel lacks. What was populated stays.
    """
    if not 1 <= threads <= THREADS_MAX:
        raise ValueError(f"{threads} threads to preallocate with: 1 to {THREADS_MAX}")
    total = block.placed_length
    job = lib.prealloc_new(block.host, total, block.page_size)
    if job == ffi.NULL:
        raise MemoryError(f"preallocating {block!r}")
    workers = [
        NamedThread(target=lib.prealloc_work, args=(job,), name=f"prealloc-{number}")
        for number in range(min(threads, max(1, total // block.page_size)))
    ]
    try:
        _run(job, workers, total, progress)
        done, error = int(lib.prealloc_done(job)), int(lib.prealloc_work(job))
    finally:
        lib.prealloc_free(job)
    if error < 0:
        raise _failure(block, -error, done)
    block.was_preallocated = True


def _run(
    job: object, workers: Sequence[threading.Thread], total: int, progress: ProgressListener | None
) -> None:
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            while worker.is_alive():
                worker.join(_REPORT_S)
                if progress is not None and worker.is_alive():
                    progress(int(lib.prealloc_done(job)), total)
        if progress is not None:
            progress(int(lib.prealloc_done(job)), total)
    except BaseException:  # Ctrl-C: nobody may use the job when it is freed
        lib.prealloc_stop(job)
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        raise


def _failure(block: RAMBlock, code: int, done: int) -> GuestMemoryError:
    what = f"block {block.idstr!r}"
    # What is populated already is no longer missing; a page was being asked for at least.
    missing = max(block.placed_length - done, block.page_size)
    if block.is_hugetlb:
        short = explain_shortage(what, block.page_size, missing, policy=block.policy)
        if short is not None:
            return short
    return GuestMemoryError(
        errno.ENOMEM if code == errno.EFAULT else code,
        f"{what}: preallocating {format_size(block.placed_length)}, {format_size(done)} were done",
        remedy="free some memory, give the block less, or raise the limit of its cgroup or node",
    )
