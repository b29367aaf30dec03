"""What a probe found, judged by what somebody wants to do."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .facts import Host
from .purposes import DEFAULT, PURPOSES, Purpose
from .row import Cause, Row, Status
from .session import Limits, run_checks


@dataclass(frozen=True, slots=True)
class Report:
    """Rows, and what they mean for one purpose.

    :ivar rows: all that were asked, in the order of the letter.
    :ivar duration_s: from the first question to the last answer.
    """

    host: Host
    purpose: Purpose
    rows: tuple[Row, ...]
    duration_s: float = 0.0

    @property
    def is_ready(self) -> bool:
        """Every required row says yes."""
        return not self.missing

    @property
    def missing(self) -> list[Row]:
        """Required rows that do not say yes."""
        return [row for row in self.of(self.purpose.required) if not row.is_yes]

    @property
    def wanting(self) -> list[Row]:
        """Wanted rows that do not say yes."""
        return [row for row in self.of(self.purpose.wanted) if not row.is_yes]

    def judge(self, purpose: Purpose) -> list[Row] | None:
        """What another purpose lacks; ``None`` when not all of its rows were asked."""
        found = self.of(purpose.required)
        if len(found) < len(purpose.required):
            return None
        return [row for row in found if not row.is_yes]

    def of(self, names: tuple[str, ...]) -> list[Row]:
        """Rows by name, in the order of the letter."""
        return [row for row in self.rows if row.name in names]

    def need(self, row: Row) -> str | None:
        """``required``, ``wanted`` or ``None``, for this purpose."""
        if row.name in self.purpose.required:
            return "required"
        return "wanted" if row.name in self.purpose.wanted else None

    @property
    def root_would_add(self) -> list[Row]:
        """What stands or falls with this user's rights; empty when it is root that asks."""
        if self.host.uid == 0:
            return []
        return [row for row in self.rows if row.outcome.cause is Cause.PERMISSION]

    def records(self) -> list[dict[str, object]]:
        """The lines of ``--json``: a host, rows, a verdict."""
        rows = [{**row.to_json(), "need": self.need(row)} for row in self.rows]
        counts = {status.value: sum(row.status is status for row in self.rows) for status in Status}
        verdict: dict[str, object] = {
            "record": "verdict",
            "for": self.purpose.name,
            "ready": self.is_ready,
            "missing": [row.name for row in self.missing],
            "wanting": [row.name for row in self.wanting],
            "root_would_add": [row.name for row in self.root_would_add],
            "purposes": {
                name: [row.name for row in lacking]
                for name, purpose in PURPOSES.items()
                if (lacking := self.judge(purpose)) is not None
            },
            "counts": counts,
            "duration_s": round(self.duration_s, 3),
        }
        return [self.host.to_json(), *rows, verdict]


def probe(
    purpose: str = DEFAULT,
    *,
    everything: bool = True,
    user: str | None = None,
    limits: Limits | None = None,
) -> Report:
    """Ask this host.

    Takes about a second on an idle machine, under three when one check hangs; see :class:`Limits`.
    Nothing on the host is changed, and no network but the loopback is used.

    :param purpose: one of :data:`PURPOSES`.
    :param everything: ``False`` asks only what the purpose requires or wants.
    :param user: ask as this user instead; takes root.
    :raises KeyError: there is no such purpose.
    :raises ProbeError: the questions could not even be put.
    """
    wanted = PURPOSES[purpose]
    start = time.monotonic()
    found = run_checks(None if everything else wanted.rows, user=user, limits=limits)
    return Report(found.host, wanted, found.rows, time.monotonic() - start)
