"""Where precopy and postcopy meet: the guest stops, and what is sent from then on it waits for."""

from __future__ import annotations

from migration.engine.states import StatusInput

from .parts import SourceParts


class SourceSwitchover:
    """One switchover, before the commit point.

    :ivar downtime_bytes: sent while the guest stood still; 0 before that is over.
    """

    def __init__(self, parts: SourceParts) -> None:
        self.downtime_bytes = 0
        self._parts = parts
        self._bytes_before = 0

    def may_begin(self) -> bool:
        """A guest that does not run loses nothing by a switchover that has to wait in the end."""
        if not self._parts.options.switchover_ack or not self._parts.guest.is_running:
            return True
        return self._parts.answers.may_switch_over

    def stop_guest(self) -> None:
        """And learn what it wrote last. :raises Exception: cancelled, or the peer is gone."""
        parts = self._parts
        parts.throttler.stop()
        parts.guest.stop()
        if parts.options.pause_first:
            parts.report.advance(StatusInput.PAUSE_BEFORE_SWITCHOVER)
            parts.control.await_continue()
            parts.answers.check_alive()
        parts.report.advance(StatusInput.GUEST_STOPPED)
        parts.ram.sync()
        # The tracker stays until the end: taking it down costs tens of milliseconds a GiB.
        self._bytes_before = parts.channels.bytes_sent

    def sent(self) -> None:
        """The destination has been sent what it needs to run the guest."""
        self.downtime_bytes = self._parts.channels.bytes_sent - self._bytes_before
