"""Two policies of one's own, for `postcopy demo --policy docs/examples/policy.py:CLASS`."""

from __future__ import annotations

from collections.abc import Sequence

from migration.engine.policy import Decision, Observed, PageRange, Progress, QemuPolicy

REGION_PAGES = 512


class Neighbours:
    """Push the rest of the 2 MiB around each requested page before anything else."""

    def __init__(self) -> None:
        self._pushed: set[tuple[str, int]] = set()

    def next_pages(self, observed: Observed) -> Sequence[PageRange]:
        """One region for each that was asked for and not pushed yet."""
        wanted = []
        for request in observed.requests:
            first = request.first - request.first % REGION_PAGES
            if (request.idstr, first) not in self._pushed:
                self._pushed.add((request.idstr, first))
                count = min(REGION_PAGES, observed.page_counts[request.idstr] - first)
                wanted.append(PageRange(request.idstr, first, count))
        return wanted


class TwoPasses:
    """At most two passes of precopy, then postcopy; QEMU's rule before that.

    It says POSTCOPY only where the user allowed it (``migrate-start-postcopy`` is not awaited).
    """

    def __init__(self) -> None:
        self._passes = 0
        self._qemu = QemuPolicy()

    def decide(self, progress: Progress) -> Decision:
        """Counts the syncs QEMU's rule asks for."""
        decision = self._qemu.decide(progress)
        if decision is Decision.SYNC:
            self._passes += 1
        is_late = self._passes >= 2 and decision in (Decision.SYNC, Decision.ITERATE)
        return Decision.POSTCOPY if is_late and progress.postcopy_allowed else decision
