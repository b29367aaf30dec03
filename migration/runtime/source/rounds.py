"""The rounds of a precopy: dirty pages again and again, until the policy says how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from guestmem.geometry import TARGET_PAGE_BYTES
from migration.engine.policy import Decision, Progress, SwitchoverPolicy
from migration.engine.throttle import Throttle, ThrottleSettings
from migration.wire.io import Writer
from migration.wire.registry import StateRegistry

from ..errors import MigrationError
from ..report import Report
from .ram import SourceRam
from .throttle import Throttler

PART_BYTES = 1 << 20
WINDOW_S = 0.1
"""Over which the bandwidth is measured; also QEMU's window."""
THROTTLE_PERIOD_S = 1.0


class Rounds:
    """The migration thread's work between set-up and switchover.

    :param bytes_sent: how much went out so far, over all channels.
    :param part_bytes: how much of RAM goes out between two looks at everything else.
    :param parameter: looks a parameter up by QEMU's name; asked again in every round.
    :param wake: set by whoever wants the next decision sooner than the rate limit would have it.
    :param check_alive: raises when the migration was cancelled or its peer is gone.
    :param postcopy_allowed: capability ``postcopy-ram`` is on.
    :param may_switch_over: the destination allows it; until then there are further rounds.
    :param postcopy_requested: whether ``migrate-start-postcopy`` was said.
    :ivar bandwidth: bytes per second over the last window; 0 until one is over.
    :ivar dirty_pages_rate: target pages the guest dirtied per second between the last two syncs.
    """

    def __init__(
        self,
        ram: SourceRam,
        registry: StateRegistry,
        bytes_sent: Callable[[], int],
        writer: Writer,
        report: Report,
        *,
        policy: SwitchoverPolicy,
        parameter: Callable[[str], int],
        wake: threading.Event,
        check_alive: Callable[[], None],
        may_switch_over: Callable[[], bool],
        postcopy_requested: Callable[[], bool],
        postcopy_allowed: bool,
        throttler: Throttler | None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._ram = ram
        self._registry = registry
        self._bytes_sent = bytes_sent
        self._part_bytes = part_bytes
        self._writer = writer
        self._report = report
        self._policy = policy
        self._parameter = parameter
        self._wake = wake
        self._check_alive = check_alive
        self._may_switch_over = may_switch_over
        self._postcopy_requested = postcopy_requested
        self._postcopy_allowed = postcopy_allowed
        self._throttler = throttler
        self._throttle = _throttle(parameter)
        self._period_start_s = self._window_start_s = time.monotonic()
        self._period_bytes = self._window_bytes = self._charged_bytes = bytes_sent()
        self._dirtied = 0
        self._synced_s = self._period_start_s
        self.bandwidth = 0.0
        self.dirty_pages_rate = 0

    def run(self) -> Decision:
        """Until COMPLETE or POSTCOPY.

        :raises ChannelError: the connection broke. :raises MigrationError: from ``check_alive``.
        """
        is_synced = True
        while True:
            self._check_alive()
            decision = self._decide(is_synced)
            if decision is Decision.SYNC:
                self._sync()
                is_synced = True
            elif decision is Decision.ITERATE:
                is_synced = self._round() == 0 and is_synced
                self._measure()
            elif self._may_switch_over():
                return decision
            elif self._round() == 0:
                # Nothing to send and nothing to decide: wait for what the guest writes.
                self._wake.wait(WINDOW_S)
                self._wake.clear()
                self._sync()
                is_synced = True

    def _decide(self, is_synced: bool) -> Decision:
        progress = self._progress(is_synced)
        try:
            decision = Decision(self._policy.decide(progress))
            if decision is Decision.POSTCOPY and not self._postcopy_allowed:
                raise ValueError("it decided for postcopy, and capability postcopy-ram is off")
            return decision
        except Exception as error:  # it may be the user's code: anything may come out of it
            name = type(self._policy).__name__
            raise MigrationError(f"switchover policy {name} failed: {error!r}") from error

    def _progress(self, is_synced: bool) -> Progress:
        told = float(self._parameter("avail-switchover-bandwidth"))
        disks = self._registry.pending_live(exact=False).precopy_bytes
        return Progress(
            remaining=self._ram.precopy_bytes_left + disks,
            must_precopy=disks,
            bandwidth=told or self.bandwidth,
            is_synced=is_synced,
            downtime_limit_ms=self._parameter("downtime-limit"),
            postcopy_requested=self._postcopy_requested(),
            postcopy_allowed=self._postcopy_allowed,
        )

    def _sync(self) -> None:
        dirtied = self._ram.sync()
        self._dirtied += dirtied * TARGET_PAGE_BYTES
        self._ram.pass_done()
        self._report.emit("MIGRATION_PASS", {"pass": self._ram.sync_count})
        now, sent = time.monotonic(), self._bytes_sent()
        self.dirty_pages_rate = int(dirtied / max(now - self._synced_s, 1e-3))
        self._synced_s = now
        if self._throttler is not None and now - self._period_start_s >= THROTTLE_PERIOD_S:
            self._throttler.percent = self._throttle.synced(
                dirtied_bytes=self._dirtied, sent_bytes=sent - self._period_bytes
            )
            self._period_start_s, self._period_bytes, self._dirtied = now, sent, 0

    def _round(self) -> int:
        """One PART, not faster than ``max-bandwidth``; target pages sent."""
        rate = self._parameter("max-bandwidth")
        budget = self._part_bytes
        if rate:
            # A quarter of a window at most, so that small limits hold smoothly too.
            budget = max(TARGET_PAGE_BYTES, min(budget, int(rate * WINDOW_S / 4)))
        start = time.monotonic()
        self._registry.save_live_iterate(self._writer, budget)
        sent = self._ram.send_part(budget)
        owed = self._uncharged_bytes()
        if rate:
            due = start + owed / rate
            delay = due - time.monotonic()
            if delay > 0:
                self._wake.wait(delay)
                self._wake.clear()
        return sent

    def _uncharged_bytes(self) -> int:
        """Sent since the last call: channels with threads of their own go on sending after a part
        was handed to them."""
        before, self._charged_bytes = self._charged_bytes, self._bytes_sent()
        return self._charged_bytes - before

    def _measure(self) -> None:
        elapsed = time.monotonic() - self._window_start_s
        if elapsed >= WINDOW_S:
            self.bandwidth = (self._bytes_sent() - self._window_bytes) / elapsed
            self._window_start_s, self._window_bytes = time.monotonic(), self._bytes_sent()


def _throttle(parameter: Callable[[str], int]) -> Throttle:
    return Throttle(
        ThrottleSettings(
            trigger=parameter("throttle-trigger-threshold"),
            initial=parameter("cpu-throttle-initial"),
            increment=parameter("cpu-throttle-increment"),
            maximum=parameter("max-cpu-throttle"),
            is_tailslow=bool(parameter("cpu-throttle-tailslow")),
        )
    )
