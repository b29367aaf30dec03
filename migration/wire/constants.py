"""Every number of QEMU's migration stream, once.

Section types, command numbers, return-path types, RAM record flags, and the bounds this project
puts on what an incoming stream may claim. A bound is not part of the format: it is the largest
value a well-behaved peer has a reason to send, so that a hostile one cannot make a reader allocate
without limit.

Source: QEMU ``docs/devel/migration/main.rst``, ``migration/savevm.h``, ``migration/ram.c``,
``migration/migration.h``; the values were checked against streams recorded from QEMU 7.2, 10.0 and
11.1.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

FILE_MAGIC: Final = 0x5145564D  # "QEVM"
FILE_VERSION: Final = 3
FILE_VERSION_OBSOLETE: Final = 2

SECTION_FOOTER: Final = 0x7E


class SectionType(IntEnum):
    """The byte in front of everything on the main stream."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    """Only inside VMState payloads and the configuration, never between sections."""
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08


class CommandNumber(IntEnum):
    """What a COMMAND section asks for (QEMU: ``enum qemu_vm_cmd``)."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11
    X_RAM_NEEDED = 0x5043
    """Ours, between two of our own ends; a QEMU has never heard of it."""
    X_RAM_ZERO = 0x5044
    """The same."""


class ReturnPathType(IntEnum):
    """Messages from the destination to the source (QEMU: ``enum mig_rp_message_type``)."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


class RamFlag(IntFlag):
    """Low bits of the be64 word in front of a RAM record; the rest of the word is the offset."""

    FULL = 0x001
    """Obsolete, never sent."""
    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    """Modifier: no block name follows, same block as the last record of this channel."""
    XBZRLE = 0x040
    HOOK = 0x080
    """RDMA only."""
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


RAM_FLAGS_MASK: Final = 0xFFF
"""The flag bits of a record word. Part of the wire format, whatever the target page size is."""

RAM_SECTION_IDSTR: Final = "ram"
RAM_SECTION_VERSION: Final = 4
XBZRLE_ENCODING: Final = 0x01
"""The only value of the byte in front of an XBZRLE payload."""

DISCARD_VERSION: Final = 0
DISCARD_RANGES_MAX: Final = 12
"""Ranges QEMU puts into one RAM_DISCARD command; a reader takes as many as the length allows."""

ZERO_RANGES_MAX: Final = 4000
"""Ranges we put into one X_RAM_ZERO command: as many as fit its length with the longest name."""

RECV_BITMAP_END: Final = 0x0123456789ABCDEF
RESUME_ACK_VALUE: Final = 1

MAPPED_RAM_VERSION: Final = 1
MAPPED_RAM_HEADER_BYTES: Final = 28
MAPPED_RAM_PAGES_ALIGNMENT: Final = 1 << 20
"""The page area of a block in a mapped-ram file starts at a multiple of this."""

MULTIFD_MAGIC: Final = 0x11223344
MULTIFD_VERSION: Final = 1
MULTIFD_INITIAL_BYTES: Final = 64
MULTIFD_PACKET_SLOTS: Final = 128
MULTIFD_PACKET_BYTES: Final = 320 + 8 * MULTIFD_PACKET_SLOTS
MULTIFD_FLAG_SYNC: Final = 0x1
MULTIFD_FLAG_METHODS: Final = 0x3E
MULTIFD_FLAG_DEVICE_STATE: Final = 0x40

# --- bounds
# -------------------------------------------------------------------------------------------------

IDSTR_BYTES_MAX: Final = 255
MACHINE_NAME_BYTES_MAX: Final = 255
CAPABILITIES_MAX: Final = 64
RAM_BLOCKS_MAX: Final = 64 << 10
RAM_BLOCK_BYTES_MAX: Final = 1 << 56
"""Block lengths keep their top byte clear: it tells an address word from a name length (see
``ram_setup``)."""
VMDESCRIPTION_BYTES_MAX: Final = 64 << 20
RETURN_PATH_PAYLOAD_MAX: Final = 512
"""What QEMU's source reads of one return-path message."""
RECV_BITMAP_BYTES_MAX: Final = 512 << 20
"""One bit per 4 KiB page: enough for a RAM block of 16 TiB."""
