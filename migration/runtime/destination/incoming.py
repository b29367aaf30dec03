"""The destination of one migration.

The main thread reads the stream up to LISTEN (the whole of it in a precopy), then loads the devices
from the package while the listen thread places pages and the fault thread asks for them. END needs
both: the stream read to its end, and the guest running.

Before LISTEN nothing is at stake here: any error ends the incoming migration cleanly and the source
keeps its guest. From RUN on a lost connection pauses: sleepers wait, and nothing is made up.

Each stage is a class of its own: :mod:`.commands`, :mod:`.switchover`,
:mod:`.postcopy`, :mod:`.resume`, :mod:`.end`. What they work
with is in :mod:`.parts`; whose the guest is when something breaks in
:mod:`.phase`, and what becomes of the migration then in :mod:`.failure`.
"""

from __future__ import annotations

import contextlib

from guestmem import CollapseReport
from migration.engine.states import Incoming, StatusInput
from migration.wire.extension import Feature

from ..channel import Channel
from ..errors import MigrationError
from ..machine import Machine
from ..options import IncomingOptions
from ..report import Report
from ..transport import Listener
from .commands import DestinationCommands
from .end import DestinationEnd
from .main_stream import MainStream
from .parts import destination_parts
from .postcopy import DestinationPostcopy
from .resume import DestinationResumption
from .switchover import DestinationSwitchover


class IncomingMigration:
    """One incoming migration over one channel. :meth:`run` is the main thread's part."""

    def __init__(
        self, machine: Machine, channel: Channel, options: IncomingOptions, report: Report
    ) -> None:
        self.machine = machine
        self.report = report
        parts = self._parts = destination_parts(machine, channel, options, report)
        self.ram = parts.ram
        self._commands = DestinationCommands(parts)
        self._end = DestinationEnd(parts)
        self._resumption = DestinationResumption(parts)
        self._postcopy = DestinationPostcopy(parts, self._resumption, self._end)
        self._switchover = DestinationSwitchover(parts, self._postcopy, self._end)

    # -- the main thread ------------------------------------------------------

    def run(self) -> None:
        """Read and load until the guest runs here (or waits for ``cont``), or fail.

        :raises RemoteStreamError: the bytes are not a stream for this machine.
        :raises MigrationError: anything else. The report says FAILED (or paused) by then.
        """
        try:
            self.report.advance(StatusInput.READY)
            if self._commands.ignores_shared:
                self.ram.keep(block for block in self.machine.ram if block.is_named_file)
            self.ram.empty()
            self.machine.registry.load_live_setup()
            stream = MainStream(
                self.machine, self.channel, self.ram, self._commands, self._switchover
            )
            stream.read()
        except Exception as error:
            self._parts.failure.main_failed(error)
            raise

    # -- requests from other threads ------------------------------------------

    def recover(self, channel: Channel, listener: Listener | None) -> None:
        """Any thread: go on over this channel, which is closed with the migration.

        :param listener: where a preempt channel will come in; ours to close.
        """
        self._resumption.offer(channel, listener)

    def pause(self) -> None:
        """``migrate-pause``: cut the channel; the listen thread does the rest."""
        self._parts.channels.abort()

    def cancel(self) -> bool:
        """Paused before RUN came: the source kept its guest, as the user knows. Back to waiting for
        a migration. False: the guest is ours, or there is nothing to give up."""
        if not self._parts.phase.cancel():
            return False
        self._resumption.give_up()
        self._parts.phase.wake_main()
        return True

    def abandon(self) -> None:
        """Any thread: nobody wants this migration any more. Sleepers are woken by SIGBUS, waiters
        return; the vCPUs must have been stopped."""
        self._parts.phase.main_fails()
        self._resumption.give_up()
        self._parts.channels.abort_for_good()
        self._parts.phase.wake_main()
        with contextlib.suppress(MigrationError):
            self._parts.memory.give_up()

    # -- looking --------------------------------------------------------------

    @property
    def channel(self) -> Channel:
        """The one that carries the stream; another one after a recovery."""
        return self._parts.channels.main

    @property
    def features(self) -> Feature:
        """Extensions agreed on with the source; none with a stock QEMU."""
        return self._parts.channels.features

    @property
    def phase(self) -> Incoming:
        """How far a postcopy is."""
        return self._parts.phase.state

    @property
    def holds_missing_pages(self) -> bool:
        """RAM is registered: closing now would show zeros to whoever still looks."""
        return self._parts.memory.is_armed

    @property
    def counts_blocktime(self) -> bool:
        """Capability ``postcopy-blocktime`` is on."""
        return self._parts.options.blocktime

    @property
    def multifd_bytes(self) -> list[int]:
        """Received per multifd channel; empty without any."""
        return self._parts.channels.multifd_bytes

    @property
    def last_word_us(self) -> int | None:
        """See :class:`DestinationEnd`."""
        return self._end.last_word_us

    @property
    def collapse_report(self) -> CollapseReport | None:
        """How far making huge pages is; ``None``: it was not asked for, or not begun."""
        return self._end.collapse_report

    # -- the end --------------------------------------------------------------

    def stop_collapsing(self) -> None:
        """At once; what is huge stays so."""
        self._end.stop_collapsing()

    def close(self) -> None:
        """End the threads and free everything, the userfaultfd last: what is missing is poisoned
        before, so that its sleepers get SIGBUS and nobody reads zeros."""
        self.abandon()
        self._parts.guest.started.set()
        self.stop_collapsing()
        self._postcopy.stop()
        self._parts.memory.close(is_complete=False)
        self._parts.channels.close_further()
        self.ram.close()
        self._parts.channels.close()
        self._resumption.close()
        self._parts.phase.close()
        self._postcopy.close()
