"""XBZRLE deltas: runs of unchanged and of new bytes, onto the page the receiver already has.

Pairs of (unchanged count, new count, new bytes); counts are ULEB128 of at most two bytes; an
unchanged count of 0 is legal only in front; a new count is never 0; what follows the last pair is
unchanged. Source: QEMU ``docs/devel/migration/xbzrle.rst`` (format), ``migration/xbzrle.c``.
"""

from __future__ import annotations

from collections.abc import Iterator


class XbzrleError(ValueError):
    """Not a delta. ``at`` is the index of the byte that cannot be."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(f"XBZRLE: {reason}")
        self.at = at


def _count(delta: bytes, at: int) -> tuple[int, int]:
    if at >= len(delta):
        raise XbzrleError("ends inside a pair", at)
    value = delta[at]
    if value < 0x80:
        return value, at + 1
    if at + 1 >= len(delta):
        raise XbzrleError("ends inside a count", at)
    if delta[at + 1] >= 0x80:
        raise XbzrleError("count of more than two bytes", at)
    return value & 0x7F | delta[at + 1] << 7, at + 2


def iter_runs(delta: bytes, page_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset in the page, new bytes) for every run of new bytes.

    :raises XbzrleError: the delta is damaged or passes ``page_bytes``.
    """
    at = target = 0
    while at < len(delta):
        start = at
        unchanged, at = _count(delta, at)
        if unchanged == 0 and start > 0:
            raise XbzrleError("no unchanged bytes between two runs", start)
        length_at = at
        new, at = _count(delta, at)
        if new == 0:
            raise XbzrleError("a run of no bytes", length_at)
        target += unchanged
        if target + new > page_bytes:
            raise XbzrleError(f"passes the page by {target + new - page_bytes} bytes", start)
        if at + new > len(delta):
            raise XbzrleError("ends inside a run", at)
        yield target, delta[at : at + new]
        at += new
        target += new


def check_xbzrle(delta: bytes, page_bytes: int) -> None:
    """Raise :class:`XbzrleError` unless ``delta`` can be applied to a page."""
    for _ in iter_runs(delta, page_bytes):
        pass


def apply_xbzrle(delta: bytes, page: bytes) -> bytes:
    """``page`` with ``delta`` applied; same errors as :func:`iter_runs`."""
    out = bytearray(page)
    for offset, data in iter_runs(delta, len(page)):
        out[offset : offset + len(data)] = data
    return bytes(out)
