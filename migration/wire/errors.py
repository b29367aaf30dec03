"""What can go wrong with a stream: our own misuse and the peer's bytes are different types.

The message of a :class:`RemoteStreamError` always names the stream offset and the section, so that
a person can open the stream with ``postcopy analyze`` at the very byte.
"""

from __future__ import annotations


class StreamError(Exception):
    """Base of everything the wire room raises."""


class LocalStreamError(StreamError):
    """We tried to write something the format cannot carry (a value out of range, a name too
    long)."""


class RemoteStreamError(StreamError):
    """The incoming bytes are not a stream we accept.

    :ivar offset: bytes from the start of the stream to the first byte that could not be accepted.
    :ivar section: the section it lies in, e.g. ``"ram"`` or ``"package/toy-ring"``; None between
        sections.
    :ivar reason: the cause alone, without place.
    """

    def __init__(self, reason: str, *, offset: int, section: str | None = None) -> None:
        where = f"section {section!r} " if section else ""
        super().__init__(f"{where}at stream offset {offset:#x}: {reason}")
        self.reason = reason
        self.offset = offset
        self.section = section


class TruncatedStreamError(RemoteStreamError):
    """The stream ended (or the connection closed) in the middle of something."""
