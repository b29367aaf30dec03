"""The kernel's bits as typed flags, through Linux 7.3.

Every set keeps bits it has no name for: a newer kernel's feature is shown and can be masked, and is
never an error. Source: ``include/uapi/linux/userfaultfd.h`` and the userfaultfd man pages.
"""

from enum import KEEP, IntFlag


class Feature(IntFlag, boundary=KEEP):
    """What a context can do. ``asked`` marks those that change behaviour when asked for.

    The others only announce: their ioctls and modes work on a context that did not ask. So whether
    something is supported is read from the *reported* set, never from the enabled one.
    """

    NONE = 0
    PAGEFAULT_FLAG_WP = 1 << 0  # 5.7: write protection of anonymous memory
    EVENT_FORK = 1 << 1  # 4.11, asked; needs CAP_SYS_PTRACE
    EVENT_REMAP = 1 << 2  # 4.11, asked
    EVENT_REMOVE = 1 << 3  # 4.11, asked
    MISSING_HUGETLBFS = 1 << 4  # 4.11
    MISSING_SHMEM = 1 << 5  # 4.11
    EVENT_UNMAP = 1 << 6  # 4.11, asked
    SIGBUS = 1 << 7  # 4.14, asked: no messages, the faulting thread gets SIGBUS
    THREAD_ID = 1 << 8  # 4.14, asked
    MINOR_HUGETLBFS = 1 << 9  # 5.13
    MINOR_SHMEM = 1 << 10  # 5.14
    EXACT_ADDRESS = 1 << 11  # 5.18, asked: addresses are not rounded down to the page
    WP_HUGETLBFS_SHMEM = 1 << 12  # 5.19
    WP_UNPOPULATED = 1 << 13  # 6.4, asked: anonymous holes can be write-protected too
    POISON = 1 << 14  # 6.6
    WP_ASYNC = 1 << 15  # 6.7, asked: the kernel resolves write faults, see PAGEMAP_SCAN
    MOVE = 1 << 16  # 6.8
    RWP = 1 << 17  # 7.3, gates Mode.RWP
    RWP_ASYNC = 1 << 18  # 7.3, asked; needs RWP

    @property
    def unknown(self) -> "Feature":
        """The bits this version has no name for."""
        return Feature(int(self) & ~_KNOWN_FEATURES)  # IntFlag's own ~ forgets unknown bits


_KNOWN_FEATURES = (1 << 19) - 1


class Mode(IntFlag, boundary=KEEP):
    """What a registered range reports."""

    MISSING = 1
    WP = 2
    MINOR = 4
    RWP = 8  # 7.3; not together with WP


class Ioctls(IntFlag, boundary=KEEP):
    """Operations the kernel offers on a context or a range.

    The answer to REGISTER over-promises once: MOVE is shown for shared memory, where it is refused.
    """

    NONE = 0
    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    RWPROTECT = 1 << 0x09  # 7.3
    SET_MODE = 1 << 0x0A  # 7.3
    API = 1 << 0x3F


class FaultFlag(IntFlag, boundary=KEEP):
    """Flags of a page-fault message. None of WP, MINOR, RWP means the page is missing."""

    NONE = 0
    WRITE = 1
    WP = 2
    MINOR = 4
    RWP = 8  # 7.3


# Mode words of the operations. PROTECT_DONTWAKE differs from the others: bit 0 there means
# "protect".
DONTWAKE = 1  # COPY, ZEROPAGE, CONTINUE, POISON, MOVE
TRANSFER_WP = 2  # COPY, CONTINUE: the page arrives write-protected
MOVE_ALLOW_SRC_HOLES = 2
PROTECT = 1  # WRITEPROTECT, RWPROTECT
PROTECT_DONTWAKE = 2

USER_MODE_ONLY = 1  #: open flag: only faults of user-mode code are reported (Linux 5.11)
API_VERSION = 0xAA
API_INITIALISED = 1 << 31  #: internal bit the kernel shows in fdinfo once the handshake is done
