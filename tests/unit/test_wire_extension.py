"""Our handshake: between two of ours it agrees, with a stock QEMU it falls silent, lies are
refused.
"""

from __future__ import annotations

import pytest

from migration.wire.errors import RemoteStreamError
from migration.wire.extension import (
    ACCEPT,
    CHOSEN,
    FIRST_PLAIN_PING,
    HELLO,
    HELLO_OURS,
    KNOWN_FEATURES,
    OFFER,
    DestinationHandshake,
    Feature,
    SourceHandshake,
    SourcePhase,
)

NOTHING = Feature(0)


def converse(source: SourceHandshake, destination: DestinationHandshake) -> list[int]:
    """Let both talk until the source is settled; returns the values of all pings."""
    waiting = [ping.value for ping in source.start()]
    said = []
    while waiting and not source.is_settled:
        value = waiting.pop(0)
        said.append(value)
        for pong in destination.on_ping(value, offset=0):
            waiting += [ping.value for ping in source.on_pong(pong.value, offset=0)]
    return said


@pytest.mark.parametrize(
    ("offered", "supported", "wanted", "chosen"),
    [
        (KNOWN_FEATURES, KNOWN_FEATURES, None, KNOWN_FEATURES),
        (KNOWN_FEATURES, Feature.CHECKSUM, None, Feature.CHECKSUM),
        (Feature.SPLIT_RUN, KNOWN_FEATURES, None, Feature.SPLIT_RUN),
        (Feature.SPLIT_RUN, Feature.CHECKSUM, None, NOTHING),
        (KNOWN_FEATURES, KNOWN_FEATURES, Feature.COUNTED, Feature.COUNTED),
    ],
)
def test_two_of_ours_agree(
    offered: Feature, supported: Feature, wanted: Feature | None, chosen: Feature
) -> None:
    """On what both have and the source wants; both sides know it."""
    source = SourceHandshake(offered, wanted=wanted)
    destination = DestinationHandshake(supported)
    said = converse(source, destination)
    assert said == [HELLO, FIRST_PLAIN_PING, OFFER | offered, CHOSEN | chosen]
    assert source.phase is SourcePhase.IN_FORCE
    assert destination.is_in_force
    assert source.chosen == destination.chosen == chosen


def test_a_stock_destination_ends_it_at_the_first_plain_pong() -> None:
    """It echoes HELLO and nothing else; nothing unknown is ever sent to it."""
    source = SourceHandshake()
    assert [ping.value for ping in source.start()] == [HELLO, FIRST_PLAIN_PING]
    assert source.on_pong(HELLO, offset=0) == ()
    assert not source.is_settled
    assert source.on_pong(FIRST_PLAIN_PING, offset=0) == ()
    assert source.phase is SourcePhase.STOCK
    assert source.is_settled
    assert source.on_pong(HELLO_OURS, offset=0) == ()
    assert source.phase is SourcePhase.STOCK


@pytest.mark.parametrize("value", [1, 2, 3, 4, 0x42, OFFER | 7, CHOSEN | 1, HELLO_OURS])
def test_a_stock_source_gets_plain_echoes(value: int) -> None:
    """Without HELLO every value is an ordinary ping."""
    destination = DestinationHandshake()
    assert [pong.value for pong in destination.on_ping(value, offset=0)] == [value]
    assert not destination.is_in_force


def test_features_that_were_not_offered_cannot_be_accepted() -> None:
    """A peer that says so is broken."""
    source = SourceHandshake(Feature.CHECKSUM)
    source.start()
    for value in (HELLO, HELLO_OURS, FIRST_PLAIN_PING):
        source.on_pong(value, offset=0)
    with pytest.raises(RemoteStreamError, match="0x2 accepted, 0x1 offered") as caught:
        source.on_pong(ACCEPT | Feature.SPLIT_RUN, offset=77)
    assert caught.value.offset == 77


def test_another_choice_cannot_be_confirmed() -> None:
    """Both directions must switch to the same."""
    source = SourceHandshake(Feature.CHECKSUM)
    source.start()
    for value in (HELLO, HELLO_OURS, FIRST_PLAIN_PING, ACCEPT | 1):
        source.on_pong(value, offset=0)
    assert source.phase is SourcePhase.CHOSEN
    with pytest.raises(RemoteStreamError, match="confirmed, not chosen"):
        source.on_pong(CHOSEN | 2, offset=0)


def test_only_accepted_features_can_be_chosen_and_only_once() -> None:
    """The destination holds the source to its word."""
    destination = DestinationHandshake(Feature.CHECKSUM)
    destination.on_ping(HELLO, offset=0)
    destination.on_ping(OFFER | 3, offset=0)
    with pytest.raises(RemoteStreamError, match="0x2 chosen, 0x1 accepted"):
        destination.on_ping(CHOSEN | 2, offset=0)
    destination.on_ping(CHOSEN | 1, offset=0)
    with pytest.raises(RemoteStreamError, match="chosen"):
        destination.on_ping(CHOSEN | 1, offset=0)
