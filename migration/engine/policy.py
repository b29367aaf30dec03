"""When to switch over, and what to push next: decisions that may be replaced by a user's own.

A switchover policy is asked once per round, a push policy once per batch of requests. Neither is on
a path that a fault waits for: requested pages are answered natively, whatever a policy does.

Source: QEMU ``migration/migration.c`` (``migration_iteration_run``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    :ivar postcopy_allowed: the capability is on: POSTCOPY may be decided, asked for or not.
    :ivar must_precopy: bytes of ``remaining`` that cannot follow once the guest runs there (disks).
    """

    remaining: int
    bandwidth: float
    is_synced: bool
    downtime_limit_ms: int
    postcopy_requested: bool
    must_precopy: int = 0
    postcopy_allowed: bool = False


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


@dataclass(frozen=True, slots=True)
class PageRange:
    """Target pages of one block.

    :ivar idstr: the block. :ivar first: index of the first page. :ivar count: how many, at least 1.
    """

    idstr: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Observed:
    """What a push policy may look at.

    :ivar requests: what the destination asked for since the last call, in the order it came.
    :ivar page_counts: target pages of each block.
    :ivar remaining: target pages not sent yet.
    :ivar elapsed_ms: since postcopy began.
    """

    requests: Sequence[PageRange]
    page_counts: Mapping[str, int]
    remaining: int
    elapsed_ms: float


class PushPolicy(Protocol):
    """Says which pages are worth pushing before the scan goes on. Without one the scan goes on
    behind the last requested page, as QEMU's does."""

    def next_pages(self, observed: Observed) -> Sequence[PageRange]:
        """Called on a thread of its own when postcopy begins and after each batch of requests.

        What was sent already is skipped; what does not exist ends the policy with an error. A page
        that is asked for comes before all of these.
        """
        ...
