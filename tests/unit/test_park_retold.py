"""A failure that repeats is told once, then ever more seldom; a new one at once."""

from __future__ import annotations

from migration.park.retold import Retold


def test_the_same_ever_more_seldom() -> None:
    breaks = Retold()
    told = [turn for turn in range(1, 101) if breaks.is_worth_a_line("broken pipe")]
    assert told == [1, 2, 4, 8, 16, 32, 64]
    assert breaks.times == " again, 100 times by now"


def test_a_new_cause_at_once() -> None:
    """Those that take turns are not new each time, nor are those that differ in a number."""
    breaks = Retold()
    assert breaks.is_worth_a_line("reset at 0x10")
    assert breaks.times == ""
    told = [breaks.is_worth_a_line(f"reset at {turn:#x}") for turn in range(4)]
    assert told == [True, False, True, False]  # the 2nd and 4th in all
    assert breaks.is_worth_a_line("broken pipe")
    assert not breaks.is_worth_a_line("broken pipe")


def test_well_in_between() -> None:
    breaks = Retold()
    for _ in range(3):
        breaks.is_worth_a_line("broken pipe")
    breaks.forget()
    assert breaks.is_worth_a_line("broken pipe")
    assert breaks.times == ""
