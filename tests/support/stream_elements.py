"""The pieces a migration stream is seen as by the scanner, and damaged as by the tampers."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum

TARGET_PAGE_BYTES = 4096
CONTINUE = 0x20  # in a RAM record's word: no block name follows, same block as before


class Kind(Enum):
    """What an :class:`Element` is. The members in capital order of a stream."""

    HEADER = "header"  # magic and version
    CONFIGURATION = "configuration"  # with its subsections
    SECTION = "section"  # type, id and, for START and FULL, name, instance, version
    COMMAND = "command"  # the whole command; PACKAGED without the package
    PAGE = "page"  # a RAM record with one page of data
    ZERO = "zero"  # a RAM record for a page of zeros
    RECORD = "record"  # any other RAM record
    OPAQUE = "opaque"  # a piece of device state, or of anything else without a length
    FOOTER = "footer"
    END = "end"  # the stream's EOF byte
    TAIL = "tail"  # VMDESCRIPTION and whatever comes after the end
    RETURN = "return"  # one whole message of the return path
    LOST = "lost"  # the scanner lost its way: bytes as they came


class Phase(Enum):
    """Where in the migration an element stands."""

    SETUP = "setup"  # up to the end of ram's START section
    PRECOPY = "precopy"
    PACKAGE = "package"  # inside PACKAGED
    POSTCOPY = "postcopy"  # after it
    RETURN = "return"  # destination to source


@dataclass
class Element:
    """One piece of the stream. ``element.wire()`` of all, joined, is the stream itself.

    ``data`` is without the headers of frames, should there be frames; ``wire`` puts them back as
    they were, so that a change of ``data`` does not match its checksum any more.
    """

    kind: Kind
    phase: Phase
    offset: int  # of its first byte in the stream
    data: bytearray
    name: str = ""  # command, section or return-path message
    block: str = ""  # RAM records
    page_offset: int = -1  # PAGE and ZERO: bytes from the start of the block
    head_bytes: int = 0  # PAGE: bytes before the page's data
    frames: list[tuple[int, bytes]] = field(default_factory=list)  # where in data, which header

    def wire(self, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes to forward for ``data[start:stop]``."""
        stop = len(self.data) if stop is None else stop
        out = bytearray()
        for at, header in self.frames:
            if start <= at < stop:
                out += self.data[start:at] + header
                start = at
        return bytes(out + self.data[start:stop])

    @property
    def page(self) -> bytes:
        """A PAGE record's contents."""
        return bytes(self.data[self.head_bytes :])

    @page.setter
    def page(self, contents: bytes) -> None:
        self.data[self.head_bytes :] = contents

    @property
    def continues(self) -> bool:
        """PAGE and ZERO: true when the record leaves the block's name out."""
        return bool(struct.unpack_from(">Q", self.data)[0] & CONTINUE)

    def name_block(self) -> None:
        """Turn a record that continues into one that names its block: ``CONTINUE`` repair."""
        if self.continues:
            word = struct.unpack_from(">Q", self.data)[0] & ~CONTINUE
            name = self.block.encode()
            self.data[:8] = struct.pack(">QB", word, len(name)) + name
            self.head_bytes += 1 + len(name)
