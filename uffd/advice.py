"""madvise and process_madvise with every advice userfaultfd users meet.

What each does on which memory (Linux 6.18) is in the comments; ``-`` is EINVAL. On a registered
range the advices that empty pages (DONTNEED, FREE, REMOVE) send a REMOVE event if the context
asked for it, and wait until it is read: never call them on the thread that reads.
"""

from collections.abc import Sequence
from enum import IntEnum

from uffd._native import ffi, lib
from uffd.errors import check


class Advice(IntEnum):
    NORMAL = 0
    RANDOM = 1
    SEQUENTIAL = 2
    WILLNEED = 3
    # anon: empties; shared: drops page table entries, the data stays; hugetlb: start must be
    # aligned to the huge page and the length is rounded DOWN to it, so less than one is silently
    # nothing.
    DONTNEED = 4
    FREE = 8  # anon only
    REMOVE = 9  # punches the file: shmem, hugetlb
    DONTFORK = 10
    DOFORK = 11
    MERGEABLE = 12
    UNMERGEABLE = 13
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    DONTDUMP = 16
    DODUMP = 17
    WIPEONFORK = 18  # private anonymous
    KEEPONFORK = 19
    COLD = 20  # hugetlb -
    PAGEOUT = 21  # hugetlb -
    POPULATE_READ = 22  # on missing registered pages: waits for the handler
    POPULATE_WRITE = 23
    DONTNEED_LOCKED = 24
    COLLAPSE = 25  # a whole aligned 2 MiB; EBUSY while a page of it is missing; hugetlb -
    HWPOISON = 100
    SOFT_OFFLINE = 101
    GUARD_INSTALL = 102  # 6.13; access is SIGSEGV; hugetlb -
    GUARD_REMOVE = 103


def madvise(address: int, length: int, advice: Advice | int) -> None:
    """Advise the kernel about a range of this process. Releases the interpreter lock.

    :param address: multiple of the base page.
    :raises UffdError: with the advice in ``operation``; see :mod:`uffd.errors` for the types.
    """
    check(
        lib.mem_madvise(address, length, int(advice)),
        f"madvise {_name(advice)}",
        address=address,
        length=length,
    )


def process_madvise(pidfd: int, ranges: Sequence[tuple[int, int]], advice: Advice | int) -> int:
    """Advise about ranges of the process behind ``pidfd``; at most 64 ranges go into one system
    call.

    Another process accepts COLD, PAGEOUT, WILLNEED and COLLAPSE; one's own pidfd also DONTNEED,
    FREE, GUARD_*, HUGEPAGE, POPULATE_* (Linux 6.18).

    :returns: bytes advised; short when a later range was refused.
    """
    flat = [word for pair in ranges for word in pair]
    vector = ffi.new("uint64_t[]", flat or 1)
    result = lib.mem_process_madvise(pidfd, vector, len(ranges), int(advice))
    return check(result, f"process_madvise {_name(advice)}")


def _name(advice: Advice | int) -> str:
    try:
        return Advice(advice).name
    except ValueError:
        return str(int(advice))
