"""Commands and return-path messages as names and plain values, for lines and tables."""

from __future__ import annotations

from migration.wire.commands import (
    Command,
    Packaged,
    Ping,
    PostcopyAdvise,
    RamDiscard,
    RamNeeded,
    RamZero,
    RecvBitmap,
    command_name,
)
from migration.wire.extension import (
    ACCEPT,
    CHOSEN,
    FEATURE_MASK,
    HELLO,
    HELLO_OURS,
    OFFER,
    Feature,
)
from migration.wire.return_path import (
    Pong,
    RecvBitmapReply,
    RequestPages,
    ResumeAck,
    ReturnPathMessage,
    Shut,
    rp_name,
)

_FAMILIES = {OFFER: "offer", ACCEPT: "accept", CHOSEN: "chosen"}


def command_fields(command: Command) -> tuple[str, dict[str, object]]:
    """Name and values of a command."""
    values: dict[str, object] = {}
    match command:
        case Ping(value):
            values = ping_fields(value)
        case PostcopyAdvise(summary, target_page_bytes):
            values = {"page_sizes": summary, "target_page_size": target_page_bytes}
        case RamDiscard(idstr, ranges) | RamZero(idstr, ranges):
            values = {"block": idstr, "ranges": [[each.start, each.length] for each in ranges]}
        case Packaged(length) | RamNeeded(length):
            values = {"length": length}
        case RecvBitmap(idstr):
            values = {"block": idstr}
    return command_name(command), values


def message_fields(message: ReturnPathMessage) -> tuple[str, dict[str, object]]:
    """Name and values of a return-path message."""
    values: dict[str, object] = {}
    match message:
        case Pong(value):
            values = ping_fields(value)
        case Shut(value) | ResumeAck(value):
            values = {"value": value}
        case RequestPages(offset, length, idstr):
            values = {"start": offset, "length": length}
            values = values if idstr is None else {"block": idstr, **values}
        case RecvBitmapReply(idstr):
            values = {"block": idstr}
    return rp_name(message), values


def ping_fields(value: int) -> dict[str, object]:
    """The value, and what it means in our own handshake (see ``wire.extension``)."""
    values: dict[str, object] = {"value": value}
    if value in (HELLO, HELLO_OURS):
        values["handshake"] = "hello" if value == HELLO else "hello-ours"
    elif family := _FAMILIES.get(value & ~FEATURE_MASK):
        values["handshake"] = family
        features = Feature(value & FEATURE_MASK)
        values["features"] = [str(each.name).lower() for each in Feature if each in features]
    return values
