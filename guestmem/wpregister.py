"""Registering a block's mappings for write protection, for both kinds of it."""

import errno

from guestmem._native import ffi, lib
from guestmem.errors import DirtyTrackingError, TrackingBusy
from guestmem.ramblock import RAMBlock

_REGISTER_WP = 1 << 1


def register_block(uffd: int, block: RAMBlock) -> None:
    """Register every mapping the block has now.

    :param uffd: after its handshake.
    :raises TrackingBusy: another userfaultfd holds it (``EBUSY``).
    :raises DirtyTrackingError: this memory cannot be tracked.
    """
    ioctls = ffi.new("uint64_t *")
    for mapping in block.mappings:
        result = lib.uffd_register(uffd, mapping.host, block.placed_length, _REGISTER_WP, ioctls)
        if result == -errno.EBUSY:
            raise TrackingBusy(
                errno.EBUSY,
                f"{block!r} is still held by another userfaultfd",
                remedy="close the incoming migration's userfaultfd first",
            )
        if result < 0:
            raise DirtyTrackingError(-result, f"registering {block!r} for write protection")
