"""Going on over a new channel after a pause, as the destination does it."""

from __future__ import annotations

import os
import queue
from typing import TypeAlias

from migration.engine.states import Status, StatusInput
from migration.native import lib

from ..channel import Channel
from ..errors import MigrationError
from ..recovery import acknowledge, answer_source
from ..transport import Listener
from .parts import DestinationParts

_MAY_RECOVER = frozenset(
    {Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER_SETUP, Status.POSTCOPY_RECOVER}
)

_Way: TypeAlias = tuple[Channel, Listener | None]


class DestinationResumption:
    """The listen thread waits here for another way; what is said there is :mod:`..recovery`'s."""

    def __init__(self, parts: DestinationParts) -> None:
        self._parts = parts
        self._ways: queue.SimpleQueue[_Way | None] = queue.SimpleQueue()

    def offer(self, channel: Channel, listener: Listener | None) -> None:
        """Any thread: go on over this channel, which is closed with the migration.

        :param listener: where a preempt channel will come in; ours to close.
        """
        self._ways.put((channel, listener))

    def give_up(self) -> None:
        """Any thread: there will be none."""
        self._ways.put(None)

    def wait(self) -> bool:
        """Paused: until a new channel works. False when the migration was given up."""
        while self._parts.report.status in _MAY_RECOVER:
            way = self._ways.get()
            if way is None:
                return False
            try:
                self._go_on_over(*way)
                return True
            except Exception as error:
                self._parts.failure.stream_failed(error)
        return False

    def _go_on_over(self, channel: Channel, listener: Listener | None) -> None:
        parts, ram = self._parts, self._parts.ram
        parts.channels.replace(channel)
        parts.report.try_advance(StatusInput.RECOVER)  # unless migrate-recover has said it
        parts.channels.restart(listener)
        parts.report.advance(StatusInput.RECOVER_CONNECTED)
        run_came = answer_source(channel, ram.received)
        parts.channels.bound_in_flight()
        lib.dst_set_channel(ram.native, channel.native)
        acknowledge(channel)
        parts.memory.pages_come_again()
        parts.report.advance(StatusInput.RESUMED)
        asked = lib.dst_request_again(ram.native)
        if asked < 0:
            raise MigrationError(f"asking again: {os.strerror(-asked)}")
        if run_came:
            parts.phase.run_repeated()

    def close(self) -> None:
        """Ways that nobody went any more."""
        while not self._ways.empty():
            if (unused := self._ways.get()) is not None:
                for each in unused:
                    if each is not None:
                        each.close()
