"""A few of the runs of ``make chaos``, chosen so that every phase and every fault is among them."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import plan_of
from tests.chaos.ends import HostLacks
from tests.chaos.plan import Fault, Phase, draw
from tests.chaos.run import run
from tests.support.e2e_leaks import nothing_left
from tests.support.need import need

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

#: A minute's worth. What a seed stands for is drawn from it alone; one that was once found to break
#: something stays.
SEEDS = (
    7, 22, 31, 38, 44, 49, 52, 56, 63, 68, 71, 74, 84, 86, 93, 106, 129, 181, 182, 282, 319, 337,
    393,  # the last word of a precopy lost
    403, 410, 413,
)  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_run(seed: int) -> None:
    """Two processes, a shaped link, a fault; every invariant holds."""
    plan = plan_of(seed)
    try:
        with nothing_left():
            run(plan)
    except HostLacks as error:
        need(False, str(error), remedy="free some memory")
    except BaseException as error:
        error.add_note(f"{plan.as_json()}\nrepeat it with: make chaos SEED={seed} N=1")
        raise


def test_every_phase_and_every_fault_is_among_them() -> None:
    """On a host that has everything."""
    plans = [draw(seed) for seed in SEEDS]
    assert {plan.phase for plan in plans} == set(Phase)
    assert {plan.fault for plan in plans} == set(Fault)


def test_a_seed_is_a_run() -> None:
    """The same plan every time, and another one for another seed."""
    assert draw(7) == draw(7) != draw(8)
    drawn = [draw(seed) for seed in range(300)]
    assert len({(plan.phase, plan.fault, plan.moment) for plan in drawn}) == len(drawn)
