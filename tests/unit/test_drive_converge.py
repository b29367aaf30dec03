"""When `--postcopy-if-not-converged-within` takes a migration for one that does not converge."""

from __future__ import annotations

import pytest

from migration.commands.drive import Plan, Progress


@pytest.mark.parametrize(
    ("info", "converges"),
    [
        ({"status": "active", "expected-downtime": 299}, True),
        ({"status": "active", "expected-downtime": 300}, True),
        ({"status": "active", "expected-downtime": 301}, False),
        ({"status": "active"}, False),
        ({"status": "setup"}, False),
        ({"status": "device"}, True),
        ({"status": "pre-switchover"}, True),
        ({"status": "completed"}, True),
    ],
)
def test_what_counts_as_converging(info: dict[str, object], converges: bool) -> None:
    assert Progress(1.0, info).converges(300) is converges


@pytest.mark.parametrize(
    ("plan", "wants"),
    [
        (Plan("unix:m"), False),
        (Plan("unix:m", postcopy_after_s=0.0), True),
        (Plan("unix:m", converge_within_s=0.0), True),
    ],
)
def test_either_option_wants_postcopy(plan: Plan, wants: bool) -> None:
    assert plan.wants_postcopy is wants
