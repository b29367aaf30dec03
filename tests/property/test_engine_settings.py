"""Capabilities, parameters and the switchover rule: all or nothing, in range, never a surprise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from migration.engine.policy import Decision, Progress, QemuPolicy
from migration.engine.settings import (
    KNOWN,
    OFFERED,
    PARAMETERS,
    SettingError,
    change_capabilities,
    change_parameters,
    default_parameters,
)

NAMES = st.text("abcdefghijklmnopqrstuvwxyz-", max_size=30)
STRANGE = NAMES.filter(lambda name: name not in OFFERED and name not in KNOWN)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)


def value_of(name: str) -> st.SearchStrategy[Any]:
    """What the parameter accepts."""
    known = PARAMETERS[name]
    if isinstance(known.default, bool):
        return st.booleans()
    if known.choices:
        return st.sampled_from(known.choices)
    return st.integers(known.low, known.high)


CHANGES = st.sets(st.sampled_from(sorted(PARAMETERS))).flatmap(
    lambda names: st.fixed_dictionaries({name: value_of(name) for name in names})
)


# -- capabilities ---------------------------------------------------------------------------------


def is_consistent(state: dict[str, bool]) -> bool:
    """What the combinations must satisfy, said in another way than in the code."""
    return not (
        (state["postcopy-preempt"] and not state["postcopy-ram"])
        or (state["switchover-ack"] and not state["return-path"])
        or (state["mapped-ram"] and (state["postcopy-ram"] or state["xbzrle"]))
        or (state["multifd"] and (state["mapped-ram"] or state["xbzrle"]))
        or (state["x-ignore-shared"] and (state["postcopy-ram"] or state["mapped-ram"]))
    )


@given(st.lists(st.dictionaries(st.sampled_from(sorted(OFFERED)), st.booleans()), max_size=8))
def test_offered_capabilities(steps: list[dict[str, bool]]) -> None:
    """Every sequence of changes ends in a combination that works; a refused one changed nothing."""
    current = dict(OFFERED)
    for changes in steps:
        before, wanted = dict(current), {**current, **changes}
        if is_consistent(wanted):
            current = change_capabilities(current, changes)
            assert current == wanted
        else:
            with pytest.raises(SettingError, match=r"incompatible|not compatible|requires"):
                change_capabilities(current, changes)
            assert current == before


@given(st.sampled_from(sorted(KNOWN)), st.booleans())
def test_a_known_capability_that_is_not_offered(name: str, state: bool) -> None:
    """Off is what it is anyway; on is refused by name, never accepted and ignored."""
    if not state:
        assert change_capabilities(OFFERED, {name: state}) == OFFERED
        return
    with pytest.raises(SettingError, match=f"'{name}' is not offered"):
        change_capabilities(OFFERED, {name: state})


@given(STRANGE, st.booleans())
def test_an_unknown_capability(name: str, state: bool) -> None:
    with pytest.raises(SettingError) as caught:
        change_capabilities(OFFERED, {"events": True, name: state})
    assert repr(name)[1:-1] in str(caught.value)


def test_the_lists_do_not_overlap() -> None:
    assert not set(OFFERED) & KNOWN
    assert is_consistent(dict(OFFERED))


# -- parameters -----------------------------------------------------------------------------------


@given(CHANGES, CHANGES)
def test_values_in_range_are_taken_over(first: dict[str, Any], second: dict[str, Any]) -> None:
    """And every other parameter stays."""
    start = default_parameters()
    middle = change_parameters(start, first)
    assert middle == {**start, **first}
    assert change_parameters(middle, second) == {**start, **first, **second}
    assert start == default_parameters()


@given(CHANGES, st.sampled_from(sorted(PARAMETERS)), VALUES)
def test_a_value_of_another_type_or_out_of_range(
    good: dict[str, Any], name: str, value: object
) -> None:
    """One bad value spoils all changes, and the message says which and what would do."""
    known = PARAMETERS[name]
    if isinstance(known.default, bool):
        assume(not isinstance(value, bool))
    elif known.choices:
        assume(value not in known.choices)
    elif isinstance(value, int) and not isinstance(value, bool):
        assume(not known.low <= value <= known.high)
    before = default_parameters()
    with pytest.raises(SettingError, match=name) as caught:
        change_parameters(before, {**good, name: value})
    assert before == default_parameters()
    assert ("does not accept" if known.choices else "expects") in str(caught.value)


def test_a_choice_of_qemus_that_is_not_offered() -> None:
    """Told from a value that does not exist."""
    with pytest.raises(SettingError, match="'cpr-exec' is not offered"):
        change_parameters(default_parameters(), {"mode": "cpr-exec"})


@given(STRANGE.filter(lambda name: name not in PARAMETERS), VALUES)
def test_an_unknown_parameter(name: str, value: object) -> None:
    with pytest.raises(SettingError):
        change_parameters(default_parameters(), {name: value})


@pytest.mark.parametrize("name", PARAMETERS)
def test_both_ends_of_a_range_belong_to_it(name: str) -> None:
    known = PARAMETERS[name]
    if isinstance(known.default, bool) or known.choices:
        return
    for value in (known.low, known.high, known.default):
        assert change_parameters(default_parameters(), {name: value})[name] == value
    for value in (known.low - 1, known.high + 1):
        with pytest.raises(SettingError, match=str(known.high)):
            change_parameters(default_parameters(), {name: value})


# -- when to switch over --------------------------------------------------------------------------


@st.composite
def progress(draw: st.DrawFn) -> Progress:
    """Any moment of a migration; what must go before is a part of what is left."""
    remaining = draw(st.integers(0, 1 << 50))
    return Progress(
        remaining=remaining,
        bandwidth=draw(st.floats(0, 1e12)),
        is_synced=draw(st.booleans()),
        downtime_limit_ms=draw(st.integers(0, 2_000_000)),
        postcopy_requested=draw(st.booleans()),
        must_precopy=draw(st.integers(0, remaining)),
    )


@given(progress())
def test_the_guest_is_stopped_only_when_the_rest_fits_the_pause(now: Progress) -> None:
    """And, to complete, only when the kernel was asked since the last page went out."""
    decision = QemuPolicy().decide(now)
    allowed = now.bandwidth * now.downtime_limit_ms / 1000
    if decision is Decision.COMPLETE:
        assert now.is_synced
        assert now.remaining <= allowed
    elif decision is Decision.POSTCOPY:
        assert now.postcopy_requested
        assert now.must_precopy <= allowed
    elif decision is Decision.SYNC:
        assert not now.is_synced
    else:
        assert now.remaining > allowed


@given(progress())
def test_asked_for_postcopy_starts_unless_something_must_go_before(now: Progress) -> None:
    """With only RAM left it starts at the next look, whatever was measured."""
    only_ram = Progress(
        now.remaining, now.bandwidth, now.is_synced, now.downtime_limit_ms, True, must_precopy=0
    )
    assert QemuPolicy().decide(only_ram) is Decision.POSTCOPY


@given(progress())
def test_an_idle_guest_completes_after_one_more_look(now: Progress) -> None:
    """Nothing left: ask the kernel once, then it is done. No bandwidth need ever be measured."""
    idle = Progress(0, 0.0, False, now.downtime_limit_ms, False)
    assert QemuPolicy().decide(idle) is Decision.SYNC
    asked = Progress(0, 0.0, True, now.downtime_limit_ms, False)
    assert QemuPolicy().decide(asked) is Decision.COMPLETE
