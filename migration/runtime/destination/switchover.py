"""The main thread from the package, or the end of a precopy, to the guest's start."""

from __future__ import annotations

from migration.engine.states import IncomingInput
from migration.native import lib
from migration.wire.errors import RemoteStreamError
from migration.wire.extension import Feature
from migration.wire.return_path import Pong

from ..errors import MigrationError
from .end import DestinationEnd
from .parts import DestinationParts
from .postcopy import DestinationPostcopy


class DestinationSwitchover:
    """A :class:`~.main_stream.Switchover`, which see; ``at`` is the offset in the stream, for
    errors."""

    def __init__(
        self, parts: DestinationParts, postcopy: DestinationPostcopy, end: DestinationEnd
    ) -> None:
        self._parts = parts
        self._postcopy = postcopy
        self._end = end

    @property
    def is_started(self) -> bool:
        """The guest was started (or waits for ``cont``)."""
        return self._parts.guest.started.is_set()

    def listen(self, at: int) -> None:
        """LISTEN, the first command of the package."""
        self._postcopy.listen(at)

    def package_ping(self, value: int) -> None:
        """A PING inside the package: everything before it is loaded. From this answer on the source
        may say RUN at any time, and whether it did is not known here should the stream be lost."""
        channels, phase = self._parts.channels, self._parts.phase
        phase.note_may_be_ours(Feature.SPLIT_RUN in channels.features)
        try:
            channels.answer(Pong(value))
        except MigrationError:
            phase.note_may_be_ours(False)
            raise

    def await_run(self, at: int) -> None:
        """The package is loaded, which its last PONG told the source; RUN comes alone."""
        if Feature.SPLIT_RUN not in self._parts.channels.features:
            raise RemoteStreamError("the package ends without RUN", offset=at)
        self._parts.phase.await_run()
        self.run_guest(at)

    def run_guest(self, at: int) -> None:
        """RUN, unless the stream was lost before."""
        self._parts.phase.run(at)
        lib.dst_set_running(self._parts.ram.native)
        self._parts.guest.start(honour_run_state=False)

    def finish_precopy(self) -> None:
        """The EOF byte without a package: everything is here."""
        self._parts.channels.end_multifd()
        self._parts.phase.advance(IncomingInput.STREAM_EOF, self._parts.channels.main.position)
        self._end.of_precopy()
