"""JSON text exactly as QEMU writes its description trailer: one line, ``", "`` and ``": "`` between
things.

Written as a stream of calls instead of from a ``dict`` because QEMU's own output repeats keys: the
elements of a list describe themselves one after the other inside one field object.
"""

from __future__ import annotations

_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def quote(text: str) -> str:
    """``text`` as a JSON string, everything but printable ASCII escaped."""
    out = []
    for character in text:
        if character in _SHORT:
            out.append(_SHORT[character])
        elif " " <= character <= "~":
            out.append(character)
        else:
            units = character.encode("utf-16-be", "surrogatepass")
            out += [f"\\u{units[i]:02X}{units[i + 1]:02X}" for i in range(0, len(units), 2)]
    return '"' + "".join(out) + '"'


class JsonText:
    """Builds one JSON value call by call. The caller keeps starts and ends balanced."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._needs_comma = False

    def start_object(self, key: str | None = None) -> None:
        """Open ``{``; ``key`` is given inside an object and left out inside an array."""
        self._put(key, "{")
        self._needs_comma = False

    def end_object(self) -> None:
        """Close ``}``."""
        self._parts.append("}")
        self._needs_comma = True

    def start_array(self, key: str | None = None) -> None:
        """Open ``[``."""
        self._put(key, "[")
        self._needs_comma = False

    def end_array(self) -> None:
        """Close ``]``."""
        self._parts.append("]")
        self._needs_comma = True

    def string(self, key: str, value: str) -> None:
        """Add a string member."""
        self._put(key, quote(value))

    def integer(self, key: str, value: int) -> None:
        """Add an integer member."""
        self._put(key, str(value))

    def raw(self, key: str | None, text: str) -> None:
        """Add a value that is JSON text already."""
        self._put(key, text)

    def text(self) -> str:
        """Everything so far."""
        return "".join(self._parts)

    def _put(self, key: str | None, text: str) -> None:
        if self._needs_comma:
            self._parts.append(", ")
        if key is not None:
            self._parts.append(quote(key) + ": ")
        self._parts.append(text)
        self._needs_comma = True
