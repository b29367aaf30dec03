"""Auto-converge: how much of their time the vCPUs must sleep so that precopy gets ahead of them.

Source: QEMU ``migration/ram.c`` (``migration_trigger_throttle``) and its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThrottleSettings:
    """QEMU's parameters, in percent.

    :ivar trigger: dirtied bytes above this share of the sent ones count as "does not converge".
    :ivar initial, increment, maximum: of the share of time that a vCPU sleeps.
    :ivar is_tailslow: near the end smaller steps, to what is ideal by the rates measured.
    """

    trigger: int = 50
    initial: int = 20
    increment: int = 10
    maximum: int = 99
    is_tailslow: bool = False


class Throttle:
    """Decides once per sync of the dirty bitmaps.

    :ivar percent: what holds now; 0 = the vCPUs run freely.
    """

    def __init__(self, settings: ThrottleSettings) -> None:
        self._settings = settings
        self._high_periods = 0
        self.percent = 0

    def synced(self, *, dirtied_bytes: int, sent_bytes: int) -> int:
        """A period is over; the new percentage. Two bad periods in a row tighten it once."""
        threshold = sent_bytes * self._settings.trigger // 100
        if dirtied_bytes <= threshold:
            self._high_periods = 0
            return self.percent
        self._high_periods += 1
        if self._high_periods >= 2:
            self._high_periods = 0
            self._tighten(threshold, dirtied_bytes)
        return self.percent

    def _tighten(self, threshold: int, dirtied_bytes: int) -> None:
        settings = self._settings
        if self.percent == 0:
            self.percent = min(settings.maximum, settings.initial)
            return
        step = settings.increment
        if settings.is_tailslow and dirtied_bytes:
            running = 100 - self.percent
            ideal = running * threshold // dirtied_bytes
            step = max(1, min(step, running - ideal))
        self.percent = min(settings.maximum, self.percent + step)
