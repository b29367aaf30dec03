"""The connections of one incoming multifd migration.

They may come in any order, so each is told by its first bytes. Whoever listens waits for the first
one as long as it takes; from then on the others must come within a bound.
"""

from __future__ import annotations

import select
import time
from uuid import UUID

from migration.wire.constants import FILE_MAGIC, MULTIFD_INITIAL_BYTES, MULTIFD_MAGIC
from migration.wire.errors import RemoteStreamError
from migration.wire.multifd import decode_greeting

from ..channel import Channel
from ..errors import MigrationError
from ..transport import Listener

CHANNELS_TIMEOUT_S = 30.0
_TRICKLE_S = 0.02  # a greeting that has come in part only is looked at again so soon
_MAGIC_BYTES = 4
_REMEDY = "capability multifd and multifd-channels must be the same at both ends"


class ChannelsError(MigrationError):
    """The connections that came are not those of a multifd migration with so many channels."""


def gather(
    listener: Listener,
    first: Channel,
    count: int,
    *,
    vm: UUID | None = None,
    timeout_s: float = CHANNELS_TIMEOUT_S,
) -> tuple[Channel, tuple[Channel, ...]]:
    """The main channel, from which nothing was read, and the multifd channels in the order of their
    numbers, each behind its greeting. Waits without the GIL.

    :param first: the connection that came already; ours to close from now on.
    :param count: how many multifd channels there must be.
    :param vm: of this VM; the source's must be the same, as a QEMU has it. None: it has none.
    :param timeout_s: for all the others.
    :raises ChannelsError: they did not all come, or one is not what it should be. All that had come
        are closed.
    :raises MigrationError: :meth:`Listener.wake` was called.
    """
    gathering = _Gathering(first, count, vm)
    try:
        return gathering.run(listener, timeout_s)
    except BaseException:
        gathering.close()
        raise


def is_multifd(channel: Channel) -> bool:
    """Whether a connection from which nothing was read has begun as a multifd channel does."""
    return channel.arrived(_MAGIC_BYTES) == MULTIFD_MAGIC.to_bytes(_MAGIC_BYTES, "big")


class _Gathering:
    def __init__(self, first: Channel, count: int, vm: UUID | None) -> None:
        self._count = count
        self._vm = vm
        self._main: Channel | None = None
        self._channels: dict[int, Channel] = {}
        self._silent = [first]  # have not said what they are

    def run(self, listener: Listener, timeout_s: float) -> tuple[Channel, tuple[Channel, ...]]:
        until = time.monotonic() + timeout_s
        while True:
            for channel in list(self._silent):
                self._listen_to(channel)
            if self._main is not None and len(self._channels) == self._count:
                break
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise ChannelsError(self._missing(timeout_s))
            new = listener.wait(*self._what_to_watch(left_s))
            if new is not None:
                self._silent.append(new)
        return self._main, tuple(self._channels[index] for index in range(self._count))

    def _what_to_watch(self, left_s: float) -> tuple[list[int], float]:
        """A connection that has said a part of its greeting would be readable all the time."""
        watched = [each.read_fd for each in self._silent if each.arrived(1) is None]
        is_trickling = len(watched) < len(self._silent)
        return watched, _TRICKLE_S if is_trickling else left_s

    def _listen_to(self, channel: Channel) -> None:
        has_ended = _has_hung_up(channel)  # asked first: what comes meanwhile is looked at
        data = channel.arrived(MULTIFD_INITIAL_BYTES) or b""
        magic = int.from_bytes(data[:_MAGIC_BYTES], "big")
        wanted = MULTIFD_INITIAL_BYTES if magic == MULTIFD_MAGIC else _MAGIC_BYTES
        if len(data) < wanted:
            if has_ended:
                raise ChannelsError(
                    f"a connection was closed before it said what it is ({len(data)} bytes)"
                )
            return
        if magic == MULTIFD_MAGIC:
            self._take(channel)
        elif magic == FILE_MAGIC and self._main is None:
            self._main = channel
        else:
            raise ChannelsError(
                f"a connection that begins with {magic:#010x} is neither the main channel nor a "
                f"multifd channel; {_REMEDY}"
            )
        self._silent.remove(channel)

    def _take(self, channel: Channel) -> None:
        try:
            greeting = decode_greeting(channel.read(MULTIFD_INITIAL_BYTES))
        except RemoteStreamError as error:
            raise ChannelsError(str(error)) from None
        index = greeting.channel
        if greeting.vm != self._vm:
            theirs, ours = (vm or "none" for vm in (greeting.vm, self._vm))
            raise ChannelsError(
                f"multifd channel {index} is of a VM with UUID {theirs}, this machine's is {ours}: "
                "start both with the same -uuid"
            )
        if index >= self._count:
            raise ChannelsError(
                f"multifd channel {index} came, and there are {self._count} here; {_REMEDY}"
            )
        if index in self._channels:
            raise ChannelsError(f"multifd channel {index} came twice")
        self._channels[index] = channel

    def _missing(self, timeout_s: float) -> str:
        have = f"{len(self._channels)} of {self._count} multifd channels"
        main = "the main channel" if self._main is not None else "no main channel"
        return f"{main} and {have} came within {timeout_s:g} s; {_REMEDY}"

    def close(self) -> None:
        mains = [] if self._main is None else [self._main]
        for channel in (*mains, *self._channels.values(), *self._silent):
            channel.close()


def _has_hung_up(channel: Channel) -> bool:
    """Nothing more will come, though what came may not have been read."""
    poll = select.poll()
    poll.register(channel.read_fd, select.POLLRDHUP)
    return bool(poll.poll(0))
