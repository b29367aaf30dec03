"""The tables of states, walked at random and exhaustively: a listed state, or an error and no
change.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.engine.states import (
    INCOMING,
    RESTING,
    STATUS,
    Incoming,
    IncomingInput,
    StateError,
    StateMachine,
    Status,
    StatusInput,
)

Table = Mapping[tuple[Enum, Enum], Enum]
TABLES: dict[str, tuple[Table, type[Enum], type[Enum], Enum]] = {
    "incoming": (INCOMING, Incoming, IncomingInput, Incoming.NONE),  # type: ignore[dict-item]
    "status": (STATUS, Status, StatusInput, Status.NONE),  # type: ignore[dict-item]
}
AFTER_COMMIT = {
    Status.POSTCOPY_ACTIVE,
    Status.POSTCOPY_PAUSED,
    Status.POSTCOPY_RECOVER_SETUP,
    Status.POSTCOPY_RECOVER,
}
"""The guest may run at the destination."""


def reachable(table: Table, start: Enum, *, without: frozenset[Enum] = frozenset()) -> set[Enum]:
    """States that some inputs, none of them in ``without``, lead to."""
    found, todo = {start}, [start]
    while todo:
        here = todo.pop()
        for (state, input_), then in table.items():
            if state is here and input_ not in without and then not in found:
                found.add(then)
                todo.append(then)
    return found


@pytest.mark.parametrize("name", TABLES)
def test_every_pair_of_state_and_input(name: str) -> None:
    """It follows the table, or says what would have been accepted and stays where it is."""
    table, states, inputs, _ = TABLES[name]
    for state, input_ in product(states, inputs):
        machine = StateMachine(table, state)
        if (state, input_) in table:
            assert machine.accepts(input_)
            assert machine.advance(input_) is table[state, input_] is machine.state
            continue
        assert not machine.accepts(input_)
        with pytest.raises(StateError) as caught:
            machine.advance(input_)
        assert machine.state is caught.value.actual is state
        assert caught.value.input is input_
        assert caught.value.required == {s for s, i in table if i is input_}
        named: list[Any] = [state, input_, *caught.value.required]
        for each in named:
            assert str(each.value) in str(caught.value)


@pytest.mark.parametrize("name", TABLES)
@given(data=st.data())
def test_random_walks(name: str, data: st.DataObject) -> None:
    """However it is driven, the state is where the accepted inputs lead, and no other input did
    anything."""
    table, _, inputs, start = TABLES[name]
    machine, model = StateMachine(table, start), start
    for input_ in data.draw(st.lists(st.sampled_from(list(inputs)), max_size=60)):
        if (model, input_) in table:
            model = table[model, input_]
            machine.advance(input_)
        else:
            with pytest.raises(StateError):
                machine.advance(input_)
        assert machine.state is model


@pytest.mark.parametrize("name", TABLES)
def test_no_row_is_dead(name: str) -> None:
    """Every state can be reached, and every input is good for something."""
    table, states, inputs, start = TABLES[name]
    assert reachable(table, start) == set(states)
    assert {input_ for _, input_ in table} == set(inputs)


@given(st.lists(st.sampled_from(IncomingInput), max_size=20))
def test_after_listen_the_end_needs_both_the_stream_and_the_guest(
    inputs: list[IncomingInput],
) -> None:
    machine = StateMachine(INCOMING, Incoming.NONE)
    accepted: list[IncomingInput] = []
    for input_ in inputs:
        if machine.accepts(input_):
            machine.advance(input_)
            accepted.append(input_)
    if machine.state is Incoming.END and IncomingInput.LISTEN in accepted:
        assert accepted.count(IncomingInput.RUN) == accepted.count(IncomingInput.STREAM_EOF) == 1
    if machine.state in (Incoming.LISTENING, Incoming.STREAM_READ):
        assert IncomingInput.RUN not in accepted


def test_the_end_of_an_incoming_migration_is_the_end() -> None:
    assert not [input_ for state, input_ in INCOMING if state is Incoming.END]


def test_nothing_is_discarded_and_nobody_listens_twice_once_ram_is_registered() -> None:
    """A discard behind LISTEN would drop pages of a running guest."""
    late = reachable(INCOMING, Incoming.LISTENING)  # type: ignore[arg-type]
    forbidden = {IncomingInput.RAM_DISCARD, IncomingInput.LISTEN, IncomingInput.ADVISE}
    assert not [row for row in INCOMING if row[0] in late and row[1] in forbidden]


@pytest.mark.parametrize("state", sorted(AFTER_COMMIT, key=lambda state: str(state)))
def test_once_committed_a_migration_is_never_cancelled(state: Status) -> None:
    """One guest, one side: from there only the destination's end or its loss."""
    later = reachable(STATUS, state, without=frozenset({StatusInput.START}))  # type: ignore[arg-type]
    assert later <= AFTER_COMMIT | {Status.COMPLETED, Status.FAILED}
    assert Status.COMPLETED in later
    assert (state, StatusInput.CANCEL) not in STATUS


def test_a_lost_channel_pauses_only_a_guest_that_was_given_away() -> None:
    for (state, input_), then in STATUS.items():
        assert (then is Status.POSTCOPY_PAUSED) == (input_ is StatusInput.LOST_CHANNEL)
        if input_ is StatusInput.LOST_CHANNEL:
            # Cancelling: RUN went out in the very moment the user cancelled.
            assert state in AFTER_COMMIT | {Status.CANCELLING}


def test_before_the_commit_every_state_can_be_cancelled_and_can_fail() -> None:
    resting_or_late = set(RESTING) | AFTER_COMMIT | {Status.CANCELLING}
    for state in set(Status) - resting_or_late:
        assert STATUS[state, StatusInput.CANCEL] is Status.CANCELLING
        assert STATUS[state, StatusInput.FAIL] is Status.FAILED


def test_only_a_resting_migration_is_started_and_every_other_can_come_to_rest() -> None:
    assert {state for state, input_ in STATUS if input_ is StatusInput.START} == set(RESTING)
    for state in Status:
        assert reachable(STATUS, state) & set(RESTING)  # type: ignore[arg-type]
