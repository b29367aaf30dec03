"""When to switch over. Called once per iteration, never on a path that a fault waits for.

Source: QEMU ``migration/migration.c`` (``migration_iteration_run``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Decision(Enum):
    """What the migration thread does next."""

    ITERATE = "iterate"
    SYNC = "sync"
    """Ask the kernel what was written, then decide again."""
    COMPLETE = "complete"
    POSTCOPY = "postcopy"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a policy may look at.

    :ivar remaining: bytes still dirty, as far as known without asking the kernel.
    :ivar bandwidth: bytes per second over the last window; 0 until one is measured.
    :ivar is_synced: nothing was sent since the kernel was asked last.
    :ivar downtime_limit_ms: the user's bound on the pause.
    :ivar postcopy_requested: ``migrate-start-postcopy`` was said, and the capability is on.
    :ivar must_precopy: bytes of ``remaining`` that cannot follow once the guest runs there (disks).
    """

    remaining: int
    bandwidth: float
    is_synced: bool
    downtime_limit_ms: int
    postcopy_requested: bool
    must_precopy: int = 0


class SwitchoverPolicy(Protocol):
    """Decides between another round, completion and postcopy."""

    def decide(self, progress: Progress) -> Decision:
        """Called by the migration thread after each PART section."""
        ...


class QemuPolicy:
    """QEMU's rule: complete when what is left fits the allowed pause at the measured bandwidth; go
    to postcopy when what cannot follow later does."""

    def decide(self, progress: Progress) -> Decision:
        threshold = progress.bandwidth * progress.downtime_limit_ms / 1000
        if progress.postcopy_requested and progress.must_precopy <= threshold:
            return Decision.POSTCOPY
        if progress.remaining and progress.remaining > threshold:
            return Decision.ITERATE
        return Decision.COMPLETE if progress.is_synced else Decision.SYNC
