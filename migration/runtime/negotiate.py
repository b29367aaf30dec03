"""The source's side of the extension handshake, over a live channel."""

from __future__ import annotations

import os

from migration.native import ffi, lib
from migration.wire.commands import write_command
from migration.wire.extension import (
    ACCEPT,
    CHOSEN,
    FEATURE_MASK,
    FIRST_PLAIN_PING,
    HELLO,
    HELLO_OURS,
    Feature,
    SourceHandshake,
    SourcePhase,
)

from .channel import Channel, ChannelWriter
from .errors import ChannelError, MigrationError

ANSWER_TIMEOUT_MS = 30_000
DEAF_TIMEOUT_MS = 5_000  # a command of the user's own: it answers soon, or not at all
_ALL = 0xFFFFFFFF
_FAMILY = _ALL & ~FEATURE_MASK


def negotiate(channel: Channel, native: object, offered: Feature) -> Feature:
    """Find out whether the peer is of our kind and agree on features; with a stock peer: none.

    Runs right after OPEN_RETURN_PATH with the return-path loop already reading. Blocks for one to
    three round trips, without the GIL.

    :raises ChannelError: the return path ended.
    :raises MigrationError: no answer within 30 s.
    """
    handshake = SourceHandshake(offered)
    for ping in handshake.start():
        write_command(ChannelWriter(channel), ping)
    channel.flush()
    _await(native, FIRST_PLAIN_PING, _ALL, may_be_deaf=channel.may_be_deaf)
    pongs = [HELLO, FIRST_PLAIN_PING]
    if lib.src_has_pong(native, HELLO_OURS):
        pongs.insert(1, HELLO_OURS)
    for value in pongs:
        pings = handshake.on_pong(value, offset=0)
    if handshake.phase is SourcePhase.STOCK:
        return Feature(0)
    for ping in pings:
        write_command(ChannelWriter(channel), ping)
    channel.flush()
    (chosen,) = handshake.on_pong(_await(native, ACCEPT, _FAMILY), offset=0)
    has_checksum = Feature.CHECKSUM in handshake.chosen
    if has_checksum:
        lib.src_set_frame_after_pong(native, chosen.value)
    write_command(ChannelWriter(channel), chosen)
    if has_checksum:
        channel.set_write_framed()
    else:
        channel.flush()
    handshake.on_pong(_await(native, CHOSEN, _FAMILY), offset=0)
    return handshake.chosen


def _await(native: object, value: int, mask: int, *, may_be_deaf: bool = False) -> int:
    out = ffi.new("uint32_t *")
    timeout_ms = DEAF_TIMEOUT_MS if may_be_deaf else ANSWER_TIMEOUT_MS
    result = lib.src_wait_pong(native, value, mask, timeout_ms, out)
    if result == 0:
        return int(out[0])
    text = "the destination closed the return path during the handshake"
    if result == -110 and may_be_deaf:
        raise MigrationError(
            f"the command answered nothing within {timeout_ms // 1000} s: it is one-way, which "
            "carries no return path and no postcopy"
        )
    if result == -110:  # ETIMEDOUT
        raise MigrationError(
            f"the destination did not answer a PING within {ANSWER_TIMEOUT_MS // 1000} s"
        )
    raise ChannelError(f"{text} ({os.strerror(-result)})")
