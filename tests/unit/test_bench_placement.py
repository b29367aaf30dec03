"""The rule behind the recommended placement, on costs that are given and not measured."""

from __future__ import annotations

import os

import pytest

from migration.bench.machine import choose_processors
from migration.bench.placement import PIN_RATIO, WakeCost, choose_placement, decide


def _costs(same_ns: int, *cross_ns: int) -> tuple[WakeCost, ...]:
    across = [WakeCost(9, cpu, ns, ns, 100) for cpu, ns in enumerate(cross_ns)]
    return (WakeCost(9, 9, same_ns, same_ns, 100), *across)


def test_dear_wake_ups_keep_threads_together() -> None:
    placement = decide((0, 1, 9), _costs(2_000, 25_000, 28_000))
    assert placement.fault_cpus == (9,)
    assert placement.data_cpus == (0, 1, 9)  # who seldom sleeps need not be kept near anybody
    assert placement.is_pinned
    assert (placement.same_ns, placement.cross_ns) == (2_000, 26_500)
    assert "26.5 us" in placement.reason
    assert "cpu 9" in placement.reason


def test_cheap_wake_ups_leave_it_to_the_scheduler() -> None:
    placement = decide((0, 1, 9), _costs(2_000, 2_500, 3_000))
    assert placement.fault_cpus == placement.data_cpus == (0, 1, 9)
    assert not placement.is_pinned
    assert "scheduler" in placement.reason


@pytest.mark.parametrize(("factor", "pinned"), [(PIN_RATIO - 0.01, False), (PIN_RATIO, True)])
def test_the_border(factor: float, pinned: bool) -> None:
    assert decide((0, 9), _costs(10_000, int(10_000 * factor))).is_pinned is pinned


def test_half_of_the_costs_is_not_enough() -> None:
    with pytest.raises(ValueError, match="across"):
        decide((0, 9), _costs(1_000))


def test_one_processor_needs_no_measuring() -> None:
    cpu = min(os.sched_getaffinity(0))
    placement = choose_placement([cpu])
    assert placement.fault_cpus == placement.data_cpus == (cpu,)
    assert placement.measured == ()
    assert placement.same_ns is None
    assert placement.cross_ns is None


def test_processors_of_others_are_refused() -> None:
    foreign = max(os.sched_getaffinity(0)) + 1000
    with pytest.raises(ValueError, match=str(foreign)):
        choose_placement([foreign])
    with pytest.raises(ValueError, match=str(foreign)):
        choose_processors([foreign])
    with pytest.raises(ValueError, match="no processors"):
        choose_placement([])
    with pytest.raises(ValueError, match="no processors"):
        choose_processors([])
    with pytest.raises(ValueError, match="budget"):
        choose_placement(budget_ms=0)


def test_the_users_order_counts() -> None:
    """The first is where everything sits together, the second the far one; doubles are one."""
    usable = sorted(os.sched_getaffinity(0))
    assert choose_processors().near == usable[-1]
    only = choose_processors([usable[0], usable[0]])
    assert (only.near, only.far) == (usable[0], None)
    if len(usable) > 1:
        both = choose_processors(usable[:2])
        assert (both.near, both.far) == (usable[0], usable[1])
