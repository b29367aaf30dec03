"""One plan, wherever its guest goes."""

from __future__ import annotations

from tests.chaos import into_file, judge
from tests.chaos.plan import Phase, Plan
from tests.chaos.scene import run_on_wire


def run(plan: Plan) -> judge.Outcome:
    """Carry it out and judge it.

    :raises tests.chaos.ends.Violation: an invariant does not hold.
    :raises AssertionError: something does not answer within its bound.
    """
    return into_file.run(plan) if plan.phase is Phase.FILE else run_on_wire(plan)
