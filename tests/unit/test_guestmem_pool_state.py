"""What can be had of a pool of huge pages, from the kernel's own counts."""

from __future__ import annotations

import pytest

from guestmem.pools import PoolState


@pytest.mark.parametrize(
    ("free", "reserved", "available"),
    [(12, 0, 12), (12, 5, 7), (12, 12, 0), (3, 5, 0)],
)
def test_promised_pages_are_not_to_be_had(free: int, reserved: int, available: int) -> None:
    assert PoolState(total=16, free=free, reserved=reserved, surplus=0).available == available


def test_a_count_of_reservations_below_zero_promises_nothing() -> None:
    """As Linux 5.10 shows it after huge pages were placed through a userfaultfd."""
    state = PoolState(total=16, free=12, reserved=(1 << 64) - 1, surplus=0, overcommit=4)
    assert state.available == 12
    assert state.obtainable == 16
