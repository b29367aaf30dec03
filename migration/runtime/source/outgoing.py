"""The source of one migration.

The migration thread writes: set-up, rounds of dirty pages, the switchover, then in postcopy the
pages that are left, requested ones first. The return-path thread reads: PONGs, page requests, SHUT.

Each stage is a class of its own: :mod:`.set_up`, :mod:`.precopy`,
:mod:`.postcopy`, :mod:`.resume`. What they work with is in :mod:`.parts`; when
the guest is given away, and what a failure means before and after that, in :mod:`.commit`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from guestmem import TrackerKind
from migration.engine.policy import Decision
from migration.engine.states import Status, StatusInput
from migration.native import lib
from migration.wire.extension import PING_SET_UP, Feature

from ..channel import Channel
from ..machine import Machine
from ..options import OutgoingOptions
from ..report import Report
from .parts import source_parts
from .postcopy import SourcePostcopy
from .precopy import SourcePrecopy
from .resume import SourceResumption
from .set_up import SourceSetUp
from .switchover import SourceSwitchover


class OutgoingMigration:
    """One outgoing migration over one channel. :meth:`run` is the migration thread's part."""

    def __init__(
        self, machine: Machine, channel: Channel, options: OutgoingOptions, report: Report
    ) -> None:
        self.machine = machine
        self.report = report
        parts = self._parts = source_parts(machine, channel, options, report)
        self.ram = parts.ram
        self.channels = parts.channels
        self.throttler = parts.throttler
        self._commit = parts.commit
        self._switchover = SourceSwitchover(parts)
        self._set_up = SourceSetUp(parts)
        self._precopy = SourcePrecopy(parts, self._switchover)
        self._postcopy = SourcePostcopy(parts, self._switchover)
        self._resumption = SourceResumption(parts)

    # -- requests from other threads ------------------------------------------

    def start_postcopy(self) -> None:
        """``migrate-start-postcopy``: from the next round on. Any thread, any time, any number of
        times."""
        self._parts.control.want_postcopy()

    def cancel(self) -> bool:
        """Stop, and keep the guest. Refused (False) once it was given away."""
        if self._commit.is_passed() or not self.report.try_advance(StatusInput.CANCEL):
            return False
        self._parts.control.cancel()
        lib.src_stop(self.ram.native)
        return True

    def stop_waiting(self) -> bool:
        """Cut off a precopy whose guest was given away and whose destination does not say how it
        ended; False: nothing of the kind."""
        if self.report.status is not Status.DEVICE or not self._parts.guest.is_given_away:
            return False
        self.channel.abort()
        return True

    def continue_(self) -> None:
        """``migrate-continue``: go on from the pause before the switchover."""
        self._parts.control.continue_()

    def settings_changed(self) -> None:
        """Parameters are read again: by the rounds, and by the postcopy loop, natively."""
        self._postcopy.apply_settings()
        self._parts.control.wake.set()

    def pause(self) -> None:
        """``migrate-pause``: cut the channel, the one of a recovery just begun too."""
        self.channels.abort_main()

    # -- the migration thread -------------------------------------------------

    def run(self) -> None:
        """From set-up to the end.

        :raises Exception: what went wrong; the report says FAILED, CANCELLED or POSTCOPY_PAUSED by
            then and the guest runs here again unless it was given away.
        """
        try:
            self._set_up.run()
            decision = self._precopy.iterate()
            if self._parts.answers.are_heard:
                # A destination that refuses does so here at the latest, before the guest is
                # stopped.
                self._parts.answers.await_pong(PING_SET_UP)
            if decision is Decision.POSTCOPY:
                self._postcopy.run()
            else:
                self._precopy.complete()
        except Exception as error:
            self._fail(error)
            raise
        finally:
            self.throttler.stop()
            self.channels.stop_multifd()
            with contextlib.suppress(Exception):
                self.machine.registry.save_live_cleanup()
            with contextlib.suppress(Exception):
                self._parts.tracker.stop()

    def require_resumable(self) -> None:
        """:raises MigrationError: what was on its way when the connection broke is lost."""
        self._resumption.require_possible()

    def take_over(self, features: Feature) -> None:
        """Before :meth:`resume`, in another process than the one that gave the guest away.

        :param features: what that one had agreed on with the destination.
        """
        self._resumption.take_over(features)

    def resume(self, channel: Channel) -> None:
        """Go on over a new channel after a pause; the migration thread's part, like :meth:`run`.

        :raises Exception: it broke again (paused as before), or the destination failed.
        """
        self._resumption.announce(channel)
        try:
            self._resumption.run()
            self._postcopy.push_pages()
        except Exception as error:
            self._fail(error)
            raise

    def _fail(self, error: Exception) -> None:
        self.throttler.stop()
        self._commit.fail(error)

    # -- who has the guest ----------------------------------------------------

    def is_committed(self) -> bool:
        """Whether the guest may run at the destination."""
        return self._commit.is_passed()

    def wait_loaded(self) -> bool:
        """Any thread, from postcopy-active on: sleep, without the GIL, until the destination has
        loaded its devices, or says or does something else; whether its guest may run there then."""
        return self._commit.wait_loaded()

    @property
    def may_be_complete(self) -> bool:
        """Paused, but everything was sent: only the destination's last word may be missing."""
        return self.report.status is Status.POSTCOPY_PAUSED and self.ram.is_end_sent

    def ask_complete(self, ask: Callable[[], str | None]) -> bool:
        """Whether the destination's monitor has the last word that may be missing; then this
        migration is complete.

        :param ask: tells the destination's status of it; None: it does not say.
        """
        if not self.may_be_complete or ask() != Status.COMPLETED.value:
            return False
        self._commit.completed()
        return True

    def take_back(self) -> None:
        """The guest of a failed precopy goes on here after all.

        :raises MigrationError: see :meth:`CommitPoint.take_back`.
        """
        self._commit.take_back()

    # -- looking --------------------------------------------------------------

    @property
    def channel(self) -> Channel:
        """The one that carries the stream; another one after a recovery."""
        return self.channels.main

    @property
    def features(self) -> Feature:
        """Extensions agreed on with the destination; none with a stock QEMU."""
        return self.channels.features

    @property
    def bandwidth(self) -> float:
        """Bytes per second over the last window of precopy; 0 until one is measured."""
        return self._precopy.bandwidth

    @property
    def dirty_pages_rate(self) -> int:
        """Target pages the guest dirtied per second, as of the last sync."""
        return self._precopy.dirty_pages_rate

    @property
    def precopy_bytes(self) -> int:
        """Sent before the switchover; 0 until it begins."""
        return self._precopy.bytes

    @property
    def downtime_bytes(self) -> int:
        """Sent while the guest stood still; 0 until that is over."""
        return self._switchover.downtime_bytes

    @property
    def handed_over_bytes(self) -> int:
        """Of RAM whose descriptors went to the destination instead of its pages."""
        return sum(block.used_length for block in self._parts.guest.handed)

    @property
    def tracker_kind(self) -> TrackerKind:
        """Who finds out what the guest writes."""
        return self._parts.tracker.kind

    @property
    def uses_xbzrle(self) -> bool:
        """Capability ``xbzrle`` is on."""
        return self._parts.options.xbzrle

    def close(self) -> None:
        """End the threads and free everything."""
        if self.ram.native is not None:
            lib.src_stop(self.ram.native)
        self._parts.answers.join()
        self.channels.close_multifd()
        self.ram.close()
        self.channels.close()
