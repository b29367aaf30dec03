"""Finds what is where in a migration stream as it passes: sections, commands, records, pages.

A second reader of QEMU's stream, written apart from the project's codec on purpose: the proxy that
damages streams must not share a mistake with the code it tests. It knows framing only. Device
payloads carry no length; their end is the footer, ``7e`` and the section's id, followed by a byte
that may start something new. That can in principle misfire inside a payload; it never did on the
recorded streams, and a scanner that lost its way says so and lets the rest through untouched.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

TARGET_PAGE_BYTES = 4096

COMMANDS = {
    "OPEN_RETURN_PATH": 1,
    "PING": 2,
    "ADVISE": 3,
    "LISTEN": 4,
    "RUN": 5,
    "DISCARD": 6,
    "PACKAGED": 7,
    "RESUME": 9,
    "RECV_BITMAP": 10,
    "SWITCHOVER_START": 11,
}
_NAMES = {number: name for name, number in COMMANDS.items()}
RETURN_PATH = {
    "SHUT": 1,
    "PONG": 2,
    "REQ_PAGES_ID": 3,
    "REQ_PAGES": 4,
    "RECV_BITMAP": 5,
    "RESUME_ACK": 6,
    "SWITCHOVER_ACK": 7,
}
_RETURN_NAMES = {number: name for name, number in RETURN_PATH.items()}

_ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE, _XBZRLE, _FLUSH = 2, 4, 8, 16, 32, 64, 512
_OPAQUE_CHUNK_BYTES = 1 << 16
_START, _PART, _END, _FULL, _SUBSECTION, _VMDESC, _CONFIG, _COMMAND, _FOOTER = (
    *range(1, 9),
    0x7E,
)


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
    """One piece of the stream. ``bytes(element.data)`` of all, joined, is the stream itself."""

    kind: Kind
    phase: Phase
    offset: int  # of its first byte in the stream
    data: bytearray
    name: str = ""  # command, section or return-path message
    block: str = ""  # RAM records
    page_offset: int = -1  # PAGE and ZERO: bytes from the start of the block
    head_bytes: int = 0  # PAGE: bytes before the page's data

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
        return bool(struct.unpack_from(">Q", self.data)[0] & _CONTINUE)

    def name_block(self) -> None:
        """Turn a record that continues into one that names its block: ``CONTINUE`` repair."""
        if self.continues:
            word = struct.unpack_from(">Q", self.data)[0] & ~_CONTINUE
            name = self.block.encode()
            self.data[:8] = struct.pack(">QB", word, len(name)) + name
            self.head_bytes += 1 + len(name)


class ScanError(Exception):
    """The bytes are no stream this scanner knows."""


@dataclass
class StreamScanner:
    """Feed it bytes of one direction, get the elements they complete, in order, nothing lost.

    ``lost`` tells why the rest of the stream is passed on unread, if it is; ``truncated`` that it
    ended inside an element.
    """

    returns: bool = False
    lost: str = ""
    truncated: bool = False
    position: int = 0  # stream offset of the next byte not yet in an element
    _buffer: bytearray = field(default_factory=bytearray)
    _phase: Phase = Phase.SETUP
    _sections: dict[int, str] = field(default_factory=dict)
    _block: str = ""
    _page_sizes: int = TARGET_PAGE_BYTES
    _package_end: int = -1
    _scan: Iterator[Element | None] = field(init=False)

    def __post_init__(self) -> None:
        self._scan = self._return_path() if self.returns else self._stream()

    def feed(self, data: bytes) -> list[Element]:
        """The elements that ``data`` completes; payload without a length in pieces, at once."""
        self._buffer += data
        return self._drain()

    def close(self) -> list[Element]:
        """No more bytes will come: whatever is left, as it came."""
        elements = self._drain()
        if self._buffer:
            self.truncated = True
            elements.append(self._take(Kind.LOST, len(self._buffer)))
        return elements

    def _drain(self) -> list[Element]:
        elements: list[Element] = []
        while not self.lost:
            try:
                element = next(self._scan)
            except ScanError as error:
                self.lost = f"{error} at stream offset {self.position}"
            else:
                if element is None:
                    return elements
                elements.append(element)
        if self._buffer:
            elements.append(self._take(Kind.LOST, len(self._buffer)))
        return elements

    # The walk below is one generator: an Element is complete, None asks for more bytes.

    def _take(self, kind: Kind, length: int, **facts: str | int) -> Element:
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        phase = Phase.RETURN if self.returns else self._phase
        element = Element(kind, phase, self.position, bytearray(data))
        for name, value in facts.items():
            setattr(element, name, value)
        self.position += length
        return element

    def _wait(self, length: int) -> Iterator[None]:
        """Until that many bytes are there, not consumed."""
        while len(self._buffer) < length:
            yield None

    def _u(self, width: int, at: int) -> int:
        return int.from_bytes(self._buffer[at : at + width], "big")

    def _text(self, at: int, length: int) -> str:
        return self._buffer[at : at + length].decode("utf-8", "backslashreplace")

    # Source to destination.

    def _stream(self) -> Iterator[Element | None]:
        yield from self._wait(1)
        if self._buffer[0] == ord("Q"):
            yield from self._wait(8)
            yield self._take(Kind.HEADER, 8)
            yield from self._wait(1)
            if self._buffer[0] == _CONFIG:
                yield from self._configuration()
        else:
            self._phase = Phase.POSTCOPY  # a recovery: no header, first thing is a command
        while True:
            yield from self._wait(1)
            if self._phase is Phase.PACKAGE and self.position >= self._package_end:
                self._phase = Phase.POSTCOPY
            type_ = self._buffer[0]
            if type_ == _COMMAND:
                yield from self._command()
            elif type_ in (_START, _PART, _END, _FULL):
                yield from self._section()
            elif type_ == 0:
                yield self._take(Kind.END, 1)
                yield from self._rest(Kind.TAIL)
            else:
                raise ScanError(f"no section starts with {type_:#x}")

    def _rest(self, kind: Kind) -> Iterator[Element | None]:
        while True:
            yield from self._wait(1)
            yield self._take(kind, len(self._buffer))

    def _configuration(self) -> Iterator[Element | None]:
        yield from self._wait(5)
        length = 5 + self._u(4, 1)
        yield from self._wait(length)
        yield self._take(Kind.CONFIGURATION, length)
        while True:
            yield from self._wait(2)
            if self._buffer[0] != _SUBSECTION:
                return
            name_end = 2 + self._buffer[1]
            yield from self._wait(name_end + 8)
            name, at = self._text(2, name_end - 2), name_end + 4
            if name == "configuration/uuid":
                length = at + 16
            elif name == "configuration/target-page-bits":
                length = at + 4
            elif name == "configuration/capabilities":
                count, length = self._u(4, at), at + 4
                for _ in range(count):
                    yield from self._wait(length + 1)
                    length += 1 + self._buffer[length]
            else:
                raise ScanError(f"unknown subsection {name!r}")
            yield from self._wait(length)
            yield self._take(Kind.CONFIGURATION, length, name=name)

    def _command(self) -> Iterator[Element | None]:
        yield from self._wait(5)
        number, length = self._u(2, 1), 5 + self._u(2, 3)
        yield from self._wait(length)
        name = _NAMES.get(number, f"command-{number}")
        if name == "ADVISE" and length == 21:
            self._page_sizes = self._u(8, 5)
        if name == "PACKAGED":
            end = self.position + length + self._u(4, 5)
            yield self._take(Kind.COMMAND, length, name=name)
            self._phase, self._package_end = Phase.PACKAGE, end
        else:
            yield self._take(Kind.COMMAND, length, name=name)

    def _section(self) -> Iterator[Element | None]:
        yield from self._wait(5)
        type_, section = self._buffer[0], self._u(4, 1)
        length = 5
        if type_ in (_START, _FULL):
            yield from self._wait(6)
            length = 6 + self._buffer[5] + 8
            yield from self._wait(length)
            self._sections[section] = self._text(6, self._buffer[5])
        name = self._sections.get(section, "ram" if self._phase is Phase.POSTCOPY else "?")
        yield self._take(Kind.SECTION, length, name=name)
        if name != "ram":
            yield from self._opaque(section)
            return
        yield from self._ram()
        yield from self._wait(5)
        if self._buffer[0] != _FOOTER or self._u(4, 1) != section:
            raise ScanError("no footer after ram")
        yield self._take(Kind.FOOTER, 5)
        if self._phase is Phase.SETUP:
            self._phase = Phase.PRECOPY

    def _opaque(self, section: int) -> Iterator[Element | None]:
        """A payload without a length: pass it on as it comes, watching for its footer."""
        footer = struct.pack(">BI", _FOOTER, section)
        while True:
            yield from self._wait(len(footer))
            at = self._buffer.find(footer)
            if at < 0:
                # All but what may be the beginning of a footer is payload for sure.
                sure = len(self._buffer) - len(footer) + 1
                yield self._take(Kind.OPAQUE, min(sure, _OPAQUE_CHUNK_BYTES))
                continue
            if at:
                yield self._take(Kind.OPAQUE, at)
            yield self._take(Kind.FOOTER, len(footer))
            if self._phase is Phase.PACKAGE and self.position >= self._package_end:
                return
            yield from self._wait(1)
            if self._buffer[0] in (0, _START, _PART, _END, _FULL, _COMMAND):
                return

    def _ram(self) -> Iterator[Element | None]:
        while True:
            yield from self._wait(8)
            word = self._u(8, 0)
            flags, offset = word & 0xFFF, word & ~0xFFF
            kind = flags & ~_CONTINUE
            if kind == _EOS:
                yield self._take(Kind.RECORD, 8, name="EOS")
                return
            if kind == _MEM_SIZE:
                yield from self._blocks(offset)
            elif kind == _FLUSH:
                yield self._take(Kind.RECORD, 8, name="FLUSH")
            elif kind in (_PAGE, _ZERO, _XBZRLE):
                yield from self._record(kind, flags, offset)
            else:
                raise ScanError(f"RAM record with flags {flags:#x}")

    def _record(self, kind: int, flags: int, offset: int) -> Iterator[Element | None]:
        head = 8
        if not flags & _CONTINUE:
            yield from self._wait(9)
            head = 9 + self._buffer[8]
            yield from self._wait(head)
            self._block = self._text(9, head - 9)
        if kind == _XBZRLE:
            yield from self._wait(head + 3)
            length = head + 3 + self._u(2, head + 1)
        else:
            length = head + (TARGET_PAGE_BYTES if kind == _PAGE else 1)
        yield from self._wait(length)
        yield self._take(
            {_PAGE: Kind.PAGE, _ZERO: Kind.ZERO}.get(kind, Kind.RECORD),
            length,
            name="XBZRLE" if kind == _XBZRLE else "",
            block=self._block,
            page_offset=offset,
            head_bytes=head,
        )

    def _blocks(self, total: int) -> Iterator[Element | None]:
        """The list of blocks in START: it ends where the lengths add up to the total."""
        at = 8
        while total > 0:
            yield from self._wait(at + 1)
            at += 1 + self._buffer[at]
            yield from self._wait(at + 8)
            total -= self._u(8, at)
            at += 8
            # A host page size follows only for blocks with pages larger than the target's. Its
            # first byte is 0, which no name's length is; after the last block the next record's
            # word begins with 0 as well, but is no page size.
            yield from self._wait(at + 1)
            if self._buffer[at] == 0:
                yield from self._wait(at + 8)
                if self._u(8, at) & self._page_sizes & ~TARGET_PAGE_BYTES:
                    at += 8
        yield self._take(Kind.RECORD, at, name="MEM_SIZE")

    # Destination to source.

    def _return_path(self) -> Iterator[Element | None]:
        while True:
            yield from self._wait(4)
            number, length = self._u(2, 0), 4 + self._u(2, 2)
            yield from self._wait(length)
            name = _RETURN_NAMES.get(number, f"message-{number}")
            yield self._take(Kind.RETURN, length, name=name)
            if name == "RECV_BITMAP":  # the bitmap itself stands outside the message
                yield from self._wait(8)
                bitmap = 8 + self._u(8, 0) + 8  # its size, itself, the end mark
                yield from self._wait(bitmap)
                yield self._take(Kind.OPAQUE, bitmap, name=name)
