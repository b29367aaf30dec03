"""Finds what is where in a migration stream as it passes: sections, commands, records, pages.

A second reader of QEMU's stream, written apart from the project's codec on purpose: the proxy that
damages streams must not share a mistake with the code it tests. It knows framing only. Device
payloads carry no length; their end is the footer, ``7e`` and the section's id, followed by a byte
that may start something new. That can in principle misfire inside a payload; it never did on the
recorded streams, and a scanner that lost its way says so and lets the rest through untouched.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from tests.support.stream_elements import CONTINUE, TARGET_PAGE_BYTES, Element, Kind, Phase

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

_ZERO, _MEM_SIZE, _PAGE, _EOS, _XBZRLE, _FLUSH = 2, 4, 8, 16, 64, 512
_OPAQUE_CHUNK_BYTES = 1 << 16
_START, _PART, _END, _FULL, _SUBSECTION, _VMDESC, _CONFIG, _COMMAND, _FOOTER = (
    *range(1, 9),
    0x7E,
)


# Two of our own ends switch to frames (be32 length, be32 checksum, payload) after the PING and
# the PONG that carry this value with bit 0 set; a stock QEMU never does that.
_CHOSEN, _CHOSEN_MASK, _CHECKSUM = 0x50460000, 0xFFFF0000, 1
_FRAME_HEADER_BYTES, _FRAME_PAYLOAD_MAX = 8, 128 << 10


class ScanError(Exception):
    """The bytes are no stream this scanner knows."""


class _Frames:
    """Takes frames apart: payloads to the scanner's buffer, headers remembered by their place."""

    def __init__(self, raw: bytearray) -> None:
        self.raw = raw  # bytes of a frame that is not complete yet
        self._headers: deque[tuple[int, bytes]] = deque()

    def feed(self, data: bytes) -> None:
        """More bytes from the wire."""
        self.raw += data

    def complete(self, buffer: bytearray, position: int) -> None:
        """Append the payloads of complete frames to ``buffer``, which begins at ``position``."""
        while len(self.raw) >= _FRAME_HEADER_BYTES:
            length = int.from_bytes(self.raw[:4], "big")
            if not 0 < length <= _FRAME_PAYLOAD_MAX:
                raise ScanError(f"frame of {length} bytes")
            end = _FRAME_HEADER_BYTES + length
            if len(self.raw) < end:
                return
            self._headers.append((position + len(buffer), bytes(self.raw[:_FRAME_HEADER_BYTES])))
            buffer += self.raw[_FRAME_HEADER_BYTES:end]
            del self.raw[:end]

    def headers_in(self, start: int, end: int) -> list[tuple[int, bytes]]:
        """Headers that stood before a byte of ``[start, end)``, with their distance from start."""
        found = []
        while self._headers and self._headers[0][0] < end:
            at, header = self._headers.popleft()
            found.append((at - start, header))
        return found


@dataclass
class StreamScanner:
    """Feed it bytes of one direction, get the elements they complete, in order, nothing lost.

    ``lost`` tells why the rest of the stream is passed on unread, if it is; ``truncated`` that it
    ended inside an element.
    """

    returns: bool = False
    framed: bool = False  # from the first byte on, as over the new channel of a recovery
    lost: str = ""
    truncated: bool = False
    position: int = 0  # stream offset of the next byte not yet in an element
    _buffer: bytearray = field(default_factory=bytearray)
    _frames: _Frames | None = None
    _phase: Phase = Phase.SETUP
    _sections: dict[int, str] = field(default_factory=dict)
    _block: str = ""
    _page_sizes: int = TARGET_PAGE_BYTES
    _package_end: int = -1
    _scan: Iterator[Element | None] = field(init=False)

    def __post_init__(self) -> None:
        if self.framed:
            self._frames = _Frames(bytearray())
        self._scan = self._return_path() if self.returns else self._stream()

    def feed(self, data: bytes) -> list[Element]:
        """The elements that ``data`` completes; payload without a length in pieces, at once."""
        if self._frames is None:
            self._buffer += data
        else:
            self._frames.feed(data)
        return self._drain()

    def close(self) -> list[Element]:
        """No more bytes will come: whatever is left, as it came."""
        elements = self._drain()
        rest = self._give_up()
        self.truncated = bool(rest) and not self.lost
        return elements + rest

    def _drain(self) -> list[Element]:
        elements: list[Element] = []
        while not self.lost:
            try:
                if self._frames is not None:
                    self._frames.complete(self._buffer, self.position)
                element = next(self._scan)
            except ScanError as error:
                self.lost = f"{error} at stream offset {self.position}"
            else:
                if element is None:
                    return elements
                elements.append(element)
        return elements + self._give_up()

    def _give_up(self) -> list[Element]:
        """Everything there is, untouched."""
        elements = [self._take(Kind.LOST, len(self._buffer))] if self._buffer else []
        if self._frames is not None and self._frames.raw:
            self._buffer, self._frames.raw = self._frames.raw, bytearray()
            elements.append(self._take(Kind.LOST, len(self._buffer)))
        return elements

    def _frames_follow(self, value: int) -> None:
        """After a PING or PONG: if it was the last plain one, what is left are frames."""
        if value & _CHOSEN_MASK == _CHOSEN and value & _CHECKSUM and self._frames is None:
            self._frames, self._buffer = _Frames(self._buffer), bytearray()

    # The walk below is one generator: an Element is complete, None asks for more bytes.

    def _take(self, kind: Kind, length: int, **facts: str | int) -> Element:
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        phase = Phase.RETURN if self.returns else self._phase
        element = Element(kind, phase, self.position, bytearray(data))
        for name, value in facts.items():
            setattr(element, name, value)
        if self._frames is not None:
            element.frames = self._frames.headers_in(self.position, self.position + length)
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
            element = self._take(Kind.COMMAND, length, name=name)
            if name == "PING":
                self._frames_follow(int.from_bytes(element.data[5:9], "big"))
            yield element

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
            if self._buffer[0] in (_START, _PART, _END, _FULL, _COMMAND):
                return
            if self._buffer[0] == 0 and (yield from self._is_end()):
                return

    def _is_end(self) -> Generator[None, None, bool]:
        """Whether a zero after a footer ends the stream, and is no payload that looks like one."""
        if self._phase is not Phase.PRECOPY:
            return self._phase is Phase.POSTCOPY
        yield from self._wait(2)
        return self._buffer[1] == _VMDESC

    def _ram(self) -> Iterator[Element | None]:
        while True:
            yield from self._wait(8)
            word = self._u(8, 0)
            flags, offset = word & 0xFFF, word & ~0xFFF
            kind = flags & ~CONTINUE
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
        if not flags & CONTINUE:
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
            element = self._take(Kind.RETURN, length, name=name)
            if name == "PONG":
                self._frames_follow(int.from_bytes(element.data[4:8], "big"))
            yield element
            if name == "RECV_BITMAP":  # the bitmap itself stands outside the message
                yield from self._wait(8)
                bitmap = 8 + self._u(8, 0) + 8  # its size, itself, the end mark
                yield from self._wait(bitmap)
                yield self._take(Kind.OPAQUE, bitmap, name=name)
