"""A switchover policy that goes from pass to pass only when the test says so."""

from __future__ import annotations

import threading

from migration.engine.policy import Decision, Progress

TIMEOUT_S = 60.0


class Steps:
    """Everything known to be dirty goes out; then the migration thread stands still.

    The test changes memory meanwhile and lets it :meth:`go_on`: the next pass sends what changed.
    Before the end :meth:`finish`.
    """

    def __init__(self) -> None:
        self._stands = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._is_last = False

    def decide(self, progress: Progress) -> Decision:
        if progress.remaining:
            return Decision.ITERATE
        if not progress.is_synced:
            return Decision.SYNC
        self._stands.release()
        if not self._go.acquire(timeout=TIMEOUT_S):
            raise TimeoutError("the test did not go on")
        return Decision.COMPLETE if self._is_last else Decision.SYNC

    def wait(self) -> None:
        """Until all that is dirty has gone out."""
        assert self._stands.acquire(timeout=TIMEOUT_S), "the pass did not end"

    def go_on(self) -> None:
        """Look for what changed, and send it."""
        self._go.release()

    def finish(self) -> None:
        """Switch over with what changed meanwhile."""
        self._is_last = True
        self._go.release()


class UntilPostcopy:
    """Passes without end, also where a busy machine keeps the guest from writing, until postcopy is
    asked for."""

    def decide(self, progress: Progress) -> Decision:
        if progress.postcopy_requested:
            return Decision.POSTCOPY
        return Decision.ITERATE if progress.remaining else Decision.SYNC
