"""JSON values cut out of a byte stream, with bounds on everything.

QMP clients end their commands with nothing at all (qemu.qmp), a line feed (people) or CR LF
(libvirt), so the end of a value is found by its brackets. As in QEMU's own parser: single-quoted
strings are accepted, a control character inside a string ends the attempt (how a forgotten quote is
recovered from), and the byte 0xFF, which no UTF-8 text contains, throws away whatever was half
received.

An oversized or too deeply nested value is followed to its end without being stored, so it costs one
error reply and no memory. Sans-I/O: no sockets, no threads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

MESSAGE_BYTES_MAX = 256 * 1024
"""Longest value accepted. The longest real command, a full parameter list, is about 2 KiB."""
NESTING_MAX = 64
"""Deepest nesting accepted; QMP needs four. Well below the recursion limit of :mod:`json`."""

_IN_STRING = re.compile(rb"[\x00-\x1f\"'\\\xff]")
_IN_VALUE = re.compile(rb"[\"'{}\[\]\xff]")
_SCALAR_END = re.compile(rb"[\s\"'{}\[\],:\xff]")
_SPACE = re.compile(rb"\s*")
_STRING = re.compile(rb"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL)
_BARE_QUOTE = re.compile(rb"\\.|\"", re.DOTALL)


@dataclass(frozen=True)
class Malformed:
    """Something that was not a JSON value: why, in a few words."""

    reason: str


def parse(raw: bytes) -> object:
    """One JSON value from its exact bytes.

    :returns: dict, list, str, int, float, bool or None; or a :class:`Malformed`. Never raises: the
        input is a stranger's.
    """
    try:
        return _load(raw)
    except (ValueError, RecursionError) as error:
        if b"'" not in raw:
            return Malformed(f"JSON parse error: {error}")
    try:
        return _load(_STRING.sub(_double_quoted, raw))
    except (ValueError, RecursionError) as error:
        return Malformed(f"JSON parse error: {error}")


def _load(raw: bytes) -> object:
    value = json.loads(
        raw.decode("utf-8"),
        object_pairs_hook=_object,
        parse_constant=_reject_constant,
        parse_float=_finite,
    )
    if b"\\u" in raw:  # half a surrogate pair parses, but cannot be a path or be sent back
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _reject_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


def _double_quoted(match: re.Match[bytes]) -> bytes:
    """A single-quoted string in the spelling :mod:`json` knows; others unchanged."""
    text = match.group()
    if text.startswith(b'"'):
        return text

    def fix(part: re.Match[bytes]) -> bytes:
        found = part.group()
        return {b'"': b'\\"', b"\\'": b"'"}.get(found, found)

    return b'"' + _BARE_QUOTE.sub(fix, text[1:-1]) + b'"'


class JSONSplitter:
    """Feed it chunks as they arrive; it gives the complete values in them.

    However the same bytes are cut into chunks, the same values come out.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._stored = bytearray()
        self._problem: str | None = None
        self._depth = 0
        self._quote = 0  # byte of the string's opening quote; 0 outside strings
        self._is_escaped = False  # the last chunk ended right after a backslash
        self._is_scalar = False  # in a bare word or number at top level

    def feed(self, chunk: bytes) -> list[object]:
        """Values completed by ``chunk``, in order; :class:`Malformed` where there was none."""
        return list(self._cut(chunk))

    def _cut(self, chunk: bytes) -> Iterator[object]:
        at = 0
        while at < len(chunk):
            if self._is_escaped:
                at = self._step_over_escaped(chunk, at)
            elif self._quote:
                at, done = self._in_string(chunk, at)
                if done:
                    yield self._finish()
            elif self._depth:
                at, done = self._in_value(chunk, at)
                if done:
                    yield self._finish()
            elif self._is_scalar:
                at, done = self._in_scalar(chunk, at)
                if done:
                    yield self._finish()
            else:
                at = self._between(chunk, at)
                if self._problem and not self._depth:
                    yield self._finish()

    def _step_over_escaped(self, chunk: bytes, at: int) -> int:
        self._is_escaped = False
        if chunk[at] >= 0x20 and chunk[at] != 0xFF:
            self._store(chunk, at, at + 1)
            return at + 1
        return at  # a control character ends the string, escaped or not

    def _in_string(self, chunk: bytes, at: int) -> tuple[int, bool]:
        found = _IN_STRING.search(chunk, at)
        end = found.end() if found else len(chunk)
        self._store(chunk, at, end)
        if found is None:
            return end, False
        byte = chunk[end - 1]
        if byte == 0x5C:
            self._is_escaped = True
        elif byte == self._quote:
            self._quote = 0
            return end, self._depth == 0
        elif byte < 0x20 or byte == 0xFF:
            self._problem = self._problem or "JSON parse error: control character in a string"
            return end, True
        return end, False

    def _in_value(self, chunk: bytes, at: int) -> tuple[int, bool]:
        found = _IN_VALUE.search(chunk, at)
        end = found.end() if found else len(chunk)
        self._store(chunk, at, end)
        if found is None:
            return end, False
        byte = chunk[end - 1]
        if byte in b"\"'":
            self._quote = byte
        elif byte in b"{[":
            self._open()
        elif byte in b"}]":
            self._depth -= 1
            return end, self._depth == 0
        else:
            self._problem = self._problem or "JSON parse error: stray byte 0xff"
            return end, True
        return end, False

    def _in_scalar(self, chunk: bytes, at: int) -> tuple[int, bool]:
        found = _SCALAR_END.search(chunk, at)
        end = found.start() if found else len(chunk)
        self._store(chunk, at, end)
        return end, found is not None

    def _between(self, chunk: bytes, at: int) -> int:
        """At top level, before a value: skip white space and look what comes."""
        space = _SPACE.match(chunk, at)
        at = space.end() if space else at
        if at == len(chunk):
            return at
        byte = chunk[at]
        if byte in b"{[":
            self._open()
        elif byte in b"\"'":
            self._quote = byte
        elif byte in b"}],:\xff":
            self._problem = f"JSON parse error: a value cannot begin with byte {byte:#04x}"
        else:
            self._is_scalar = True
            return at  # _in_scalar stores it
        self._store(chunk, at, at + 1)
        return at + 1

    def _open(self) -> None:
        self._depth += 1
        if self._depth > NESTING_MAX:
            self._refuse(f"JSON nested deeper than {NESTING_MAX}")

    def _store(self, chunk: bytes, start: int, end: int) -> None:
        if self._problem is not None:
            return
        if len(self._stored) + end - start > MESSAGE_BYTES_MAX:
            self._refuse(f"JSON value longer than {MESSAGE_BYTES_MAX} bytes")
        else:
            self._stored += chunk[start:end]

    def _refuse(self, reason: str) -> None:
        self._problem = self._problem or reason
        self._stored.clear()

    def _finish(self) -> object:
        problem, raw = self._problem, bytes(self._stored)
        self._reset()
        return Malformed(problem) if problem else parse(raw)
