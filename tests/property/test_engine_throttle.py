"""Auto-converge: never above the maximum, never relaxed by itself, tightened only after two bad
periods in a row.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from migration.engine.throttle import Throttle, ThrottleSettings

PERCENT = st.integers(1, 99)
SETTINGS = st.builds(
    ThrottleSettings, st.integers(1, 100), PERCENT, PERCENT, PERCENT, st.booleans()
)
PERIODS = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 40)), max_size=60)


@given(SETTINGS, PERIODS)
def test_any_history(settings: ThrottleSettings, periods: list[tuple[int, int]]) -> None:
    throttle, last, bad_in_a_row = Throttle(settings), 0, 0
    for dirtied, sent in periods:
        percent = throttle.synced(dirtied_bytes=dirtied, sent_bytes=sent)
        assert percent == throttle.percent
        assert last <= percent <= settings.maximum
        bad_in_a_row = bad_in_a_row + 1 if dirtied > sent * settings.trigger // 100 else 0
        if percent > last:
            assert bad_in_a_row >= 2
            assert bad_in_a_row % 2 == 0
            assert last == 0 or percent - last <= settings.increment
        last = percent


@given(SETTINGS)
def test_a_guest_that_never_converges_is_throttled_to_the_maximum(
    settings: ThrottleSettings,
) -> None:
    """In at most a hundred steps of two periods: each step is one percent or more."""
    throttle = Throttle(settings)
    for _ in range(2 * 100):
        throttle.synced(dirtied_bytes=1 << 40, sent_bytes=0)
    assert throttle.percent == settings.maximum
