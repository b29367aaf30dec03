"""Handing guest RAM itself to another process of this host: descriptors instead of pages.

QEMU calls it ``mode=cpr-transfer``. Between two of our own ends, over a unix socket, each block
made of a memfd is passed by its descriptor (SCM_RIGHTS, unix(7)), and the destination maps it in
the place of its own memory. Nothing is copied; the rest of the migration is a precopy with little
or nothing to send.

    source                                        destination
    ... block list, PING 5                        PONG 5
    be32 magic, be32 count, descriptors           maps them
    PING 7                                        PONG 7: taken, or an error before the guest stops

From then on both processes map one memory. Only one of them runs the guest, which the commit point
sees to as always; the other must let go of it (:func:`let_go`) before it does anything else with
its RAM, for its zeros would be the guest's.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence

from guestmem import RAMBlock, RAMList
from guestmem.errors import GuestMemoryError
from migration.wire.errors import RemoteStreamError

from .channel import Channel
from .errors import MigrationError

_HEADER = struct.Struct(">II")
_MAGIC = 0x50434D46
_AT_ONCE = 250  # the kernel passes 253


def blocks_to_hand_over(ram: RAMList) -> list[RAMBlock]:
    """In the order of the block list, which both ends have.

    :raises MigrationError: there is none; says what to do.
    """
    blocks = [block for block in ram if block.can_be_handed_over]
    if not blocks:
        kinds = ", ".join(sorted({block.backing.value for block in ram}))
        raise MigrationError(
            f"no RAM here can be handed over (it is {kinds}): start both ends with "
            "--backing memfd or --backing hugetlb"
        )
    return blocks


def require_channel(channel: Channel) -> None:
    """:raises MigrationError: descriptors do not travel over this channel."""
    if not channel.carries_descriptors:
        raise MigrationError(
            f"{channel.peer}: memory is handed over through a unix socket only; use unix:PATH"
        )


def hand_over(channel: Channel, blocks: Sequence[RAMBlock]) -> None:
    """The source's half. :raises ChannelError: the connection broke."""
    for some in _in_parts(blocks):
        fds = [block.fd for block in some if block.fd is not None]
        channel.send_descriptors(_HEADER.pack(_MAGIC, len(fds)), fds)


def take_over(channel: Channel, blocks: Sequence[RAMBlock]) -> None:
    """The destination's half: ``blocks`` are the source's memory afterwards.

    :raises RemoteStreamError: other bytes, or another number of descriptors.
    :raises MigrationError: memory that does not fit the block it is for.
    :raises ChannelError: the connection broke.
    """
    for some in _in_parts(blocks):
        data, fds = channel.receive_descriptors(_HEADER.size, len(some))
        with contextlib.ExitStack() as stack:
            for fd in fds:
                stack.callback(os.close, fd)
            magic, count = _HEADER.unpack(data)
            if magic != _MAGIC or not count == len(fds) == len(some):
                raise RemoteStreamError(
                    f"{len(fds)} descriptors announced as {count}, {len(some)} blocks wait for one",
                    offset=channel.position,
                    section="handover",
                )
            for block, fd in zip(some, fds, strict=True):
                _adopt(block, fd)


def _adopt(block: RAMBlock, fd: int) -> None:
    try:
        block.adopt(fd)
    except GuestMemoryError as error:
        raise MigrationError(f"the memory handed over does not fit: {error}") from None


def let_go(blocks: Sequence[RAMBlock]) -> list[str]:
    """Whoever does not have the guest: forget its memory.

    :returns: names of blocks for which there was no new memory. They are closed: nothing here can
        touch them any more, and neither can a guest.
    """
    lost = []
    for block in blocks:
        try:
            block.renew()
        except (GuestMemoryError, ValueError):
            lost.append(block.idstr)
            block.close()
    return lost


def _in_parts(blocks: Sequence[RAMBlock]) -> Iterator[Sequence[RAMBlock]]:
    for first in range(0, len(blocks), _AT_ONCE):
        yield blocks[first : first + _AT_ONCE]
