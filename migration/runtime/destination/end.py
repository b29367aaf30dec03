"""The end of an incoming migration: nothing is missing, the source hears of it, RAM is ordinary
again."""

from __future__ import annotations

import contextlib
import time

from guestmem import Collapser, CollapseReport
from guestmem.geometry import TARGET_PAGE_BYTES
from migration.engine.states import IncomingInput, StatusInput
from migration.wire.errors import RemoteStreamError, TruncatedStreamError

from ..errors import MigrationError
from ..memory_report import misplaced
from .main_stream import skip_description
from .parts import DestinationParts


class DestinationEnd:
    """Of a precopy on the main thread, of a postcopy on the listen thread.

    :ivar last_word_us: of a postcopy: microseconds from the end of the stream to the verdict sent,
        in which a stock source that loses its connection takes the guest for its own; None before.
    """

    def __init__(self, parts: DestinationParts) -> None:
        self.last_word_us: int | None = None
        self._parts = parts
        self._collapser: Collapser | None = None

    def of_precopy(self) -> None:
        """Behind the EOF byte."""
        parts, channels = self._parts, self._parts.channels
        if channels.main.is_two_way and channels.has_return_path:
            # QEMU always sends the description; one that closed instead has still sent all state.
            with contextlib.suppress(TruncatedStreamError):
                skip_description(channels.main)
        self._desensitise()  # advised, but not needed: nothing is registered
        parts.guest.start(honour_run_state=True)
        # The guest runs here whether or not the source hears of it: nothing failed.
        with contextlib.suppress(MigrationError):
            channels.shut(0)
        self._look_at_placement()
        parts.report.advance(StatusInput.DONE)

    def of_stream(self) -> None:
        """The EOF byte of a postcopy came. What is not here would read as zero from now on.

        :raises RemoteStreamError: pages were never sent.
        """
        begun_ns = time.monotonic_ns()
        parts, channels = self._parts, self._parts.channels
        channels.await_urgent_pages(lambda: parts.ram.missing_pages > 0)
        missing = parts.ram.missing_pages
        if missing:
            raise RemoteStreamError(
                f"the source ended the stream with {missing} target pages "
                f"({missing * TARGET_PAGE_BYTES >> 10} KiB) never sent",
                offset=channels.main.position,
                section="ram",
            )
        parts.phase.advance(IncomingInput.STREAM_EOF, channels.main.position)
        parts.guest.started.wait()
        # First of all: a source that loses its connection before it heard this may believe that
        # the guest never left.
        with contextlib.suppress(MigrationError):
            channels.shut(0)
        self.last_word_us = (time.monotonic_ns() - begun_ns) // 1000

    def of_postcopy(self) -> None:
        """All pages are here, and no thread asks for any: unregister, allow huge pages again."""
        self._desensitise()
        if self._parts.options.collapse:
            self._collapser = Collapser(self._parts.machine.ram, self._collapsed)
            self._collapser.start()
        self._look_at_placement()
        self._parts.report.advance(StatusInput.DONE)

    def _desensitise(self) -> None:
        self._parts.memory.close(is_complete=True)
        self._parts.machine.attach_received(None)
        self._parts.ram.restore_thp()

    def _look_at_placement(self) -> None:
        """Pages are on NUMA nodes now: the wanted ones?"""
        for text in misplaced(self._parts.machine.ram):
            self._parts.report.warn(text)

    # -- huge pages of small ones ---------------------------------------------

    def _collapsed(self, report: CollapseReport) -> None:
        figures: dict[str, object] = {"state": report.state.value, "regions": report.collapsed}
        self._parts.report.emit("X_COLLAPSED", figures)

    @property
    def collapse_report(self) -> CollapseReport | None:
        """How far making huge pages is; ``None``: it was not asked for, or not begun."""
        return self._collapser.report() if self._collapser is not None else None

    def stop_collapsing(self) -> None:
        """At once; what is huge stays so."""
        if self._collapser is not None:
            self._collapser.stop()
