"""All connections of one outgoing migration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from migration.native import lib
from migration.wire.commands import Command, write_command
from migration.wire.extension import Feature

from ..channel import Channel, ChannelWriter
from ..errors import native_error
from ..multifd import MultifdSenders, connect_senders
from ..negotiate import negotiate
from ..options import OutgoingOptions


class SourceChannels:
    """The main channel, preempt's second one, multifd's, and what a recovery put out of use.

    Everything here is the migration thread's, but for :meth:`abort` and the figures.

    :param native: ``struct src *``, which sends and reads on them.
    :ivar main: carries the stream; another one after a recovery. :ivar writer: writes it.
    :ivar features: extensions agreed on with the destination; none before :meth:`negotiate`.
    """

    def __init__(self, main: Channel, native: Any, options: OutgoingOptions) -> None:
        self.main = main
        self.writer = ChannelWriter(main)
        self.features = Feature(0)
        self._native = native
        self._options = options
        self._urgent: Channel | None = None
        self._connect_urgent = options.connect_urgent
        self._multifd: MultifdSenders | None = None
        self._replaced: list[Channel] = []
        self._next: Channel | None = None

    def command(self, command: Command) -> None:
        """One command into the stream. :raises ChannelError: the connection broke."""
        write_command(self.writer, command)

    def negotiate(self) -> None:
        """Agree on extensions, see :func:`~..negotiate.negotiate`."""
        self.features = negotiate(self.main, self._native, self._options.features)

    def bound_in_flight(self, channel: Channel | None = None) -> None:
        """From here on a requested page may be waited for: see :meth:`Channel.bound_in_flight`."""
        (channel or self.main).bound_in_flight(self._options.parameter("x-postcopy-sndbuf"))

    # -- preempt --------------------------------------------------------------

    def connect_urgent_at(self, connect: Callable[[], Channel]) -> None:
        """Before :meth:`replace`: where the preempt channel goes from now on."""
        if self._connect_urgent is not None:
            self._connect_urgent = connect

    def open_urgent(self) -> None:
        """The second connection. The destination takes it by its order, so the first one must have
        been accepted: a PONG came, or (7.2) it is in the listener's queue before this one."""
        if self._connect_urgent is None or self._urgent is not None:
            return
        self._urgent = self._connect_urgent()
        if Feature.CHECKSUM in self.features:
            self._urgent.set_write_framed()
        self.bound_in_flight(self._urgent)
        lib.src_set_urgent_channel(self._native, self._urgent.native)

    def end_urgent(self) -> None:
        """Nothing more goes out there. The connection itself stays until SHUT: a QEMU takes its end
        before that for a failure."""
        if self._urgent is not None:
            lib.src_end_urgent(self._native, self._options.urgent_first)

    # -- multifd --------------------------------------------------------------

    @property
    def has_multifd(self) -> bool:
        """Whether RAM goes, or went, over channels of its own in the precopy."""
        return self._multifd is not None

    def open_multifd(
        self,
        *,
        vm: UUID | None,
        check_alive: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Before the first byte: a destination of 7.2 reads nothing before all are there."""
        if self._options.connect_multifd is not None:
            self._multifd = connect_senders(
                self._native,
                self._options.connect_multifd,
                self._options.multifd_channels,
                vm=vm,
                each_section=self._options.multifd_each_section,
                check_alive=check_alive,
                failed=failed,
            )

    def start_multifd(self) -> None:
        """RAM may go out there. :raises MigrationError: a channel broke."""
        if self._multifd is None:
            return
        self._multifd.start(is_framed=Feature.CHECKSUM in self.features)
        if lib.src_multifd_sync(self._native) < 0:
            raise native_error(self._native.error, fallback="multifd channels")

    def end_multifd(self) -> None:
        """Behind the last page of a precopy, or before the first discard: nothing goes out over the
        channels any more, and what did has come before what follows on the main channel.

        :raises MigrationError: a channel broke.
        """
        if self._multifd is None:
            return
        if lib.src_multifd_flush(self._native) < 0:
            raise native_error(self._native.error, fallback="multifd channels")
        self._multifd.stop()

    def stop_multifd(self) -> None:
        """End its threads, whatever became of the pages."""
        if self._multifd is not None:
            self._multifd.stop()

    # -- recovery -------------------------------------------------------------

    def announce(self, channel: Channel) -> None:
        """A channel that will take the main one's place: :meth:`abort` cuts it too."""
        self._next = channel

    def replace(self) -> Channel:
        """The announced channel is the main one from now on."""
        assert self._next is not None
        self._replaced += [self.main, *([self._urgent] if self._urgent else [])]
        self._urgent = None
        self.main = self._next
        self.writer = ChannelWriter(self.main)
        lib.src_set_channel(self._native, self.main.native)
        if Feature.CHECKSUM in self.features:
            self.main.set_read_framed()
            self.main.set_write_framed()
        self.bound_in_flight()
        return self.main

    def replaced(self) -> None:
        """The new channel stands."""
        self._next = None

    # -- figures and the end --------------------------------------------------

    @property
    def bytes_sent(self) -> int:
        """Over the main channel and multifd's."""
        return self.main.bytes_sent + sum(self.multifd_bytes_sent)

    @property
    def multifd_bytes_sent(self) -> list[int]:
        """For each of multifd's channels; empty without any."""
        return self._multifd.bytes_sent if self._multifd is not None else []

    def abort_main(self) -> None:
        """Any thread: cut the main channel, and the one that is to take its place."""
        announced = self._next
        self.main.abort()
        if announced is not None:
            announced.abort()

    def abort(self) -> None:
        """Nothing goes out any more; whoever waits for a peer returns with an error."""
        self.main.abort()
        if self._multifd is not None:
            self._multifd.abort()

    def close_multifd(self) -> None:
        """Before the native object is freed."""
        if self._multifd is not None:
            self._multifd.close()

    def close(self) -> None:
        """After the native object was freed."""
        for channel in (self.main, self._urgent, *self._replaced):
            if channel is not None:
                channel.close()
