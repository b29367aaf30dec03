"""The guest's console: what it printed, and what nobody has read yet."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from migration.wire.vmstate import (
    U8,
    U16,
    U32,
    U64,
    Array,
    Bool,
    QTailQ,
    String,
    Unused,
    Validate,
    VBuffer,
    VMStateDescription,
)

SCROLLBACK_BYTES = 4 << 10
LINES_MAX = 256


@dataclass
class Line:
    """A line the guest finished and nobody has read. :ivar number: counts lines since birth."""

    number: int = 0
    text: str = ""


class Console:
    """Thread-safe. The oldest unread lines are dropped when more than :data:`LINES_MAX` wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.printed = 0
        self.partial = b""
        self.partial_length = 0
        self.pending: list[Line] = []
        self.line_count = 0
        self.is_muted = False
        self.attributes = [7, 0, 0, 0]

    def write(self, data: bytes) -> None:
        """The guest prints."""
        with self._lock:
            self.printed += len(data)
            *lines, rest = (self.partial + data).split(b"\n")
            self.partial = rest[-SCROLLBACK_BYTES:]
            for line in lines:
                self.line_count += 1
                text = line[:SCROLLBACK_BYTES].decode("utf-8", "replace")
                if not self.is_muted:
                    self.pending.append(Line(self.line_count, text))
            del self.pending[:-LINES_MAX]

    def read_lines(self) -> list[str]:
        """Take all lines that wait."""
        with self._lock:
            lines, self.pending = self.pending, []
        return [line.text for line in lines]

    def lock_length(self) -> None:
        """Bring the length field up to date."""
        self.partial_length = len(self.partial)


LINE = VMStateDescription(
    name="toy-console-line",
    version_id=1,
    minimum_version_id=1,
    fields=(U64("number"), String("text", prefix=U32, limit=4 * SCROLLBACK_BYTES)),
)

CONSOLE = VMStateDescription(
    name="toy-console",
    version_id=1,
    minimum_version_id=1,
    pre_save=Console.lock_length,
    fields=(
        U64("printed"),
        U64("line_count"),
        Bool("is_muted"),
        Array("attributes", 4, U8),
        Unused(3),
        U16("partial_length"),
        Validate("line fits", lambda console, _: console.partial_length <= SCROLLBACK_BYTES),
        VBuffer("partial", size="partial_length", limit=SCROLLBACK_BYTES),
        QTailQ("pending", LINE, new=Line, limit=LINES_MAX),
    ),
)
