"""What travels along while one section is saved or loaded: the stream end, the place for error
texts, the bounds.

Both contexts are stream ends themselves (a :class:`Writer`, a :class:`Reader`), so custom encoders
and old-format loaders get them in place of the channel and their errors name section and field too.
"""

from __future__ import annotations

from ..errors import LocalStreamError, RemoteStreamError, TruncatedStreamError
from ..io import Reader, Writer
from .jsontext import JsonText

SECTION_BYTES_MAX = 64 << 20
"""Payload bytes one section may have on load; more is a broken or hostile stream."""

SECTION_ELEMENTS_MAX = 1 << 22
"""Array and list elements, all together, that one section may have on load."""

DEPTH_MAX = 64
"""How deep structs and subsections may nest."""

_READ_PIECE = 1 << 20


class _Place:
    """Where in the section we are: ``pckbd`` / ``kbd.pending_tmp``."""

    def __init__(self, section: str) -> None:
        self.section = section
        self.path: list[str] = []

    def push(self, name: str) -> None:
        """Go into a field, an element (``[3]``) or a subsection."""
        self.path.append(name)

    def pop(self) -> None:
        """Come back out."""
        self.path.pop()

    def describe(self) -> str:
        """The path as a person writes it: ``ring.descs[3].addr``; empty at the top of the
        section.
        """
        out = ""
        for part in self.path:
            out += part if part.startswith("[") or not out else "." + part
        return out

    def _labelled(self, reason: str) -> str:
        path = self.describe()
        return f"field {path}: {reason}" if path else reason


class SaveContext(_Place):
    """A :class:`Writer` that knows which field it writes.

    :ivar json: description being written beside the bytes; None when nobody wants it, or while an
        element is written that an earlier one describes already.
    """

    def __init__(self, writer: Writer, *, section: str, json: JsonText | None = None) -> None:
        super().__init__(section)
        self._writer = writer
        self.json = json

    @property
    def position(self) -> int:
        """Stream offset of the next byte."""
        return self._writer.position

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``."""
        self._writer.write(data)

    def error(self, reason: str) -> LocalStreamError:
        """The error to raise for a value that cannot be sent."""
        where = f"section {self.section!r} at stream offset {self.position:#x}"
        return LocalStreamError(f"{where}: {self._labelled(reason)}")


class LoadContext(_Place):
    """A :class:`Reader` that knows which field it reads and how much one section may take."""

    def __init__(self, reader: Reader, *, section: str) -> None:
        super().__init__(section)
        self._reader = reader
        self._start = reader.position
        self._elements = 0

    @property
    def position(self) -> int:
        """Stream offset of the next byte."""
        return self._reader.position

    def read(self, length: int) -> bytes:
        """Exactly ``length`` bytes.

        :raises TruncatedStreamError: the stream ends before; section and field are named.
        :raises RemoteStreamError: the section passed :data:`SECTION_BYTES_MAX`.
        """
        if self.position + length - self._start > SECTION_BYTES_MAX:
            raise self.error(f"section is longer than {SECTION_BYTES_MAX} bytes")
        try:
            if length <= _READ_PIECE:
                return self._reader.read(length)
            # A length the peer made up must not cost memory before its bytes are really there.
            pieces = bytearray()
            while len(pieces) < length:
                pieces += self._reader.read(min(_READ_PIECE, length - len(pieces)))
            return bytes(pieces)
        except TruncatedStreamError as error:
            raise TruncatedStreamError(
                self._labelled(error.reason), offset=error.offset, section=self.section
            ) from error

    def peek(self, length: int) -> bytes:
        """Up to ``length`` of the next bytes, not consumed."""
        return self._reader.peek(length)

    def count(self, elements: int, limit: int) -> None:
        """Accept ``elements`` further array or list elements, or refuse.

        :raises RemoteStreamError: negative, above the field's ``limit``, or above what a section
            may have.
        """
        if elements < 0:
            raise self.error(f"negative count {elements}")
        if elements > limit:
            raise self.error(f"{elements} elements, limit is {limit}")
        self._elements += elements
        if self._elements > SECTION_ELEMENTS_MAX:
            raise self.error(f"section has more than {SECTION_ELEMENTS_MAX} elements")

    def error(self, reason: str, *, offset: int | None = None) -> RemoteStreamError:
        """The error to raise for bytes that are not acceptable; ``offset`` defaults to the next
        byte.
        """
        at = self.position if offset is None else offset
        return RemoteStreamError(self._labelled(reason), offset=at, section=self.section)
