"""Going on over a new channel after a pause, as the source does it."""

from __future__ import annotations

from migration.engine.states import StatusInput
from migration.native import ffi, lib
from migration.wire.extension import Feature

from ..channel import Channel
from ..errors import MigrationError
from ..recovery import SourceRecovery
from .parts import SourceParts


class SourceResumption:
    """From a new channel to the first page over it; what is said there is :mod:`..recovery`'s."""

    def __init__(self, parts: SourceParts) -> None:
        self._parts = parts

    def take_over(self, features: Feature) -> None:
        """Before :meth:`run`, in another process than the one that gave the guest away.

        :param features: what that one had agreed on with the destination.
        """
        self._parts.channels.features = features
        self._parts.commit.take_over()
        # A package of nothing: from here on requests are served.
        lib.src_send_package(self._parts.ram.native, ffi.NULL, 0, False)

    def require_possible(self) -> None:
        """:raises MigrationError: what was on its way when the connection broke is lost."""
        if self._parts.options.release:
            raise MigrationError(
                "Postcopy recovery cannot work when release-ram capability is set: pages "
                "that were on their way are lost"
            )

    def announce(self, channel: Channel) -> None:
        """The channel that :meth:`run` will use."""
        self._parts.channels.announce(channel)
        self._parts.report.advance(StatusInput.RECOVER)

    def run(self) -> None:
        """Both ends agree again on what has come. :raises Exception: it broke again."""
        parts, channels = self._parts, self._parts.channels
        recovery = self._change_channel()
        channels.replaced()
        parts.report.advance(StatusInput.RECOVER_CONNECTED)
        parts.ram.send_again(recovery.learn_received())
        channels.open_urgent()
        recovery.resume(run_again=Feature.SPLIT_RUN in channels.features)
        parts.report.advance(StatusInput.RESUMED)

    def _change_channel(self) -> SourceRecovery:
        parts = self._parts
        lib.src_stop(parts.ram.native)
        parts.answers.join()
        channel = parts.channels.replace()
        recovery = SourceRecovery(channel, parts.machine.ram, parts.ram.dirty)
        parts.commit.goes_on_after_pause()
        if parts.options.urgent_first:
            parts.channels.open_urgent()
        parts.answers.listen(channel, recovery)
        return recovery
