"""All connections of one incoming migration."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from migration.native import lib
from migration.wire.errors import RemoteStreamError
from migration.wire.extension import Feature
from migration.wire.return_path import Pong, Shut, SwitchoverAck, write_rp

from ..channel import Channel, ChannelWriter
from ..errors import MigrationError
from ..multifd import MultifdReceivers
from ..options import IncomingOptions
from ..transport import Listener
from .urgent import UrgentReceiver

LAST_PAGES_TIMEOUT_S = 10.0
LAST_PAGES_POLL_S = 0.005

Failed = Callable[[Exception], None]


class DestinationChannels:
    """The main channel, preempt's second one, multifd's, and what a recovery put out of use.

    :param native: ``struct dst *``, which reads and answers on them.
    :param multifd_failed: called from a multifd channel's thread when it broke.
    :param urgent_failed: the same of the preempt channel.
    :ivar main: carries the stream; another one after a recovery.
    :ivar features: extensions agreed on with the source; none before :meth:`agree_on`.
    :ivar has_return_path: OPEN_RETURN_PATH came.
    """

    def __init__(
        self,
        main: Channel,
        native: Any,
        options: IncomingOptions,
        *,
        multifd_failed: Failed,
        urgent_failed: Failed,
    ) -> None:
        self.main = main
        self.features = Feature(0)
        self.has_return_path = False
        self._native = native
        self._options = options
        self._replaced: list[Channel] = []
        self._lock = threading.Lock()
        self._is_over = False
        self._multifd = MultifdReceivers(native, options.multifd, multifd_failed)
        self._urgent: UrgentReceiver | None = None
        if options.listener is not None:
            self._urgent = UrgentReceiver(native, options.listener, urgent_failed)

    @property
    def _is_framed(self) -> bool:
        return Feature.CHECKSUM in self.features

    def agree_on(self, features: Feature) -> None:
        """Extensions that are in force from here on."""
        self.features = features
        if self._is_framed:
            self.main.set_write_framed()
            self.main.set_read_framed()

    def bound_in_flight(self) -> None:
        """From here on a page may be waited for: see :meth:`Channel.bound_in_flight`."""
        self.main.bound_in_flight(self._options.in_flight_bytes)

    # -- the return path ------------------------------------------------------

    def answer(self, message: Pong | Shut | SwitchoverAck) -> None:
        """One message on the return path; whole, since other threads answer there too.

        :raises MigrationError: the connection broke.
        """
        if isinstance(message, Pong):
            result = lib.dst_pong(self._native, message.value)
            if result < 0:
                raise MigrationError(f"answering on the return path: {os.strerror(-result)}")
            return
        write_rp(ChannelWriter(self.main), message)
        self.main.flush()

    def shut(self, value: int) -> None:
        """The last word, if there is a way for it. :raises MigrationError: see :meth:`answer`."""
        if self.has_return_path:
            self.answer(Shut(value))

    # -- multifd --------------------------------------------------------------

    def start_multifd(self, has_flush: bool, at: int) -> None:
        """The START section is read: from here on pages may come over the channels.

        :param has_flush: the channels meet at flushes only, not at each EOS.
        """
        if not self._multifd.count:
            if has_flush:
                raise RemoteStreamError(
                    "the source uses multifd channels; capability multifd is off here", offset=at
                )
            return
        self._refuse_further_multifd()  # they are there: a source connects all before it says START
        self._multifd.start(is_framed=self._is_framed, each_section=not has_flush)
        self._multifd.meet()

    def end_multifd(self) -> None:
        """The source said that it has flushed them: from here on RAM changes under their feet."""
        self._multifd.stop()
        if self._multifd.count:
            self._refuse_further_multifd()  # one may have been slow to say what it is

    def _refuse_further_multifd(self) -> None:
        if self._urgent is not None:
            self._urgent.refuse_multifd()

    @property
    def multifd_bytes(self) -> list[int]:
        """Received per multifd channel; empty without any."""
        return self._multifd.bytes_received

    # -- preempt --------------------------------------------------------------

    @property
    def has_urgent(self) -> bool:
        """Requested pages come over a connection of their own."""
        return self._urgent is not None

    def start_urgent(self) -> None:
        """Wait for that connection, and place what comes there, in a thread."""
        if self._urgent is not None:
            self._urgent.start(is_framed=self._is_framed)

    def await_urgent_pages(self, are_missing: Callable[[], bool]) -> None:
        """The last requested pages may still be on their way on the other channel."""
        if self._urgent is None:
            return
        until = time.monotonic() + LAST_PAGES_TIMEOUT_S
        while are_missing() and time.monotonic() < until:
            if self._urgent.ended.wait(LAST_PAGES_POLL_S):
                return

    def stop_urgent(self) -> None:
        """Nothing more comes there."""
        if self._urgent is not None:
            self._urgent.stop()

    # -- recovery -------------------------------------------------------------

    def replace(self, channel: Channel) -> None:
        """This is the main one from now on. Nobody else uses the old one any more, but a request
        may be on its way into it: it stays open."""
        with self._lock:
            self._replaced.append(self.main)
            self.main = channel
            is_over = self._is_over
        if is_over:
            channel.abort()

    def restart(self, listener: Listener | None) -> None:
        """Checksums go on as before; a preempt channel is waited for anew.

        :param listener: where it comes in; None: where the last one did.
        """
        self.agree_on(self.features)
        if self._urgent is not None:
            self._urgent.stop()
            if listener is not None:
                self._urgent.move_to(listener)
            self._urgent.start(is_framed=self._is_framed)

    # -- the end --------------------------------------------------------------

    def abort(self) -> None:
        """Any thread: whoever waits for the source returns with an error."""
        self.main.abort()
        self._multifd.abort()

    def abort_for_good(self) -> None:
        """Any thread: :meth:`abort`, and one that takes the main channel's place is aborted too."""
        with self._lock:
            self._is_over = True
        self.abort()

    def refuse(self) -> None:
        """SHUT 1, if it still gets through."""
        with contextlib.suppress(Exception):
            self.shut(1)

    def close_further(self) -> None:
        """Preempt's and multifd's, before the native object is freed."""
        if self._urgent is not None:
            self._urgent.close()
        self._multifd.close()

    def close(self) -> None:
        """After the native object was freed."""
        for channel in (self.main, *self._replaced):
            channel.close()
