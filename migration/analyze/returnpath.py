"""A recording of the return path: messages of the destination, bitmaps of a recovery."""

from __future__ import annotations

from collections.abc import Iterator

from migration.wire.extension import CHOSEN, FEATURE_MASK, HELLO_OURS, Feature
from migration.wire.return_path import Pong, RecvBitmapReply, read_received_bitmap, read_rp

from .events import ReturnPathEvent
from .messages import message_fields
from .source import Source


def read_return_path(source: Source) -> Iterator[ReturnPathEvent]:
    """Every message up to the end of the file.

    Checksum frames are taken off from the PONG on that puts them in force.

    :raises RemoteStreamError: no legal message, or the file ends inside one.
    """
    is_ours = False
    if source.starts_with_frame():
        source.start_frames()
    while True:
        source.section = "return path"
        if source.at_end():
            return
        start, mark = source.position, source.consumed
        message = read_rp(source)
        name, values = message_fields(message)
        if isinstance(message, RecvBitmapReply):
            source.section = f"received bitmap of {message.idstr!r}"
            bitmap = read_received_bitmap(source, section=source.section)
            received = int.from_bytes(bitmap, "little").bit_count()
            values |= {"bitmap_bytes": len(bitmap), "received": received}
        yield ReturnPathEvent(start, source.consumed - mark, name, values)
        if isinstance(message, Pong):
            is_ours = is_ours or message.value == HELLO_OURS
            features = message.value & FEATURE_MASK
            if is_ours and message.value & ~FEATURE_MASK == CHOSEN and features & Feature.CHECKSUM:
                source.start_frames()
