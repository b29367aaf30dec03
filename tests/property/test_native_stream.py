"""The destination fed damaged streams: every truncation and any flipped bits end in a typed error
with its place; never a crash, a hang, or a write outside a block.

The streams are recorded from our own source first, and taken from those of real QEMUs.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from guestmem import TARGET_PAGE_BYTES
from tests.support.analyze_vectors import content, recording
from tests.support.native_replay import BARE, Outcome, Recording, play, record
from tests.support.pair import Side

pytestmark = pytest.mark.kernel

KINDS = ("precopy", "postcopy", "precopy-framed", "postcopy-framed")
FRAMED = ("precopy-framed", "postcopy-framed", "toy-postcopy-framed")
EVERY = (*KINDS, "toy-precopy", "toy-postcopy", "toy-postcopy-framed")
QEMU = (
    ("7.2", "none-zero-1m"),
    ("7.2", "none-pattern-2m"),
    ("10.0", "none-switchover-ack-2m"),
    ("11.1", "none-returnpath-2m"),
)
# What needs no place in the stream: it compares two hosts, or fails towards the source.
_PLACELESS = ("postcopy needs matching", "answering on the return path")
_PLACE = re.compile(r"stream offset (0x[0-9a-f]+)")
ENDS = {"failed", "postcopy-paused"}


@cache
def recorded(kind: str) -> Recording:
    """Made once; the same machine every time."""
    return record(
        postcopy="postcopy" in kind, checksum="framed" in kind, toy=kind.startswith("toy")
    )


@cache
def bystander() -> Side:
    """Another machine's RAM in this process: nobody may write there."""
    one = Side(**BARE)
    for block in one.machine.ram:
        block.fill(0, block.used_length, 0xA5)
    return one


def check(outcome: Outcome, recording: Recording, wire: bytes) -> None:
    """What holds for every end of every stream."""
    assert outcome.status in ENDS | {"completed"}
    if outcome.status == "completed":
        assert not outcome.error
    else:
        assert outcome.error
        place = _PLACE.search(outcome.error)
        assert place or outcome.error.startswith(_PLACELESS), outcome.error
        assert place is None or int(place[1], 16) <= len(wire)
    for block in bystander().machine.ram:
        assert block.read(0, block.used_length) == b"\xa5" * block.used_length


def check_pages(outcome: Outcome, recording: Recording) -> None:
    """Every page that counts as received is the source's."""
    for name, pages in outcome.pages.items():
        for number, data in pages.items():
            start = number * TARGET_PAGE_BYTES
            assert data == recording.ram[name][start : start + TARGET_PAGE_BYTES], (name, number)


def offsets(recording: Recording) -> st.SearchStrategy[int]:
    """Any, and more often one close to where something begins."""
    last = len(recording.wire) - 1
    near = st.builds(
        lambda border, more: min(last, max(0, border + more)),
        st.sampled_from(recording.borders),
        st.integers(-3, 24),
    )
    return near | near | st.integers(0, last)


@pytest.mark.parametrize("kind", EVERY)
def test_the_whole_stream(kind: str) -> None:
    """As a measure for the rest: undamaged it completes, and all of RAM is there."""
    one = recorded(kind)
    outcome = play(one, one.wire)
    assert (outcome.status, outcome.error) == ("completed", "")
    check_pages(outcome, one)
    if outcome.pages:
        assert {n: len(p) * TARGET_PAGE_BYTES for n, p in outcome.pages.items()} == {
            name: len(data) for name, data in one.ram.items()
        }


@pytest.mark.parametrize("kind", EVERY)
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_truncated(kind: str, data: st.DataObject) -> None:
    """Cut anywhere it fails, or, once the guest is here, pauses: unless only the description of a
    precopy is missing."""
    one = recorded(kind)
    length = data.draw(offsets(one))
    wire = one.wire[:length]
    outcome = play(one, wire)
    check(outcome, one, wire)
    check_pages(outcome, one)
    if outcome.status == "completed":
        assert not one.postcopy
        assert one.framed_from is None  # a cut frame is never taken for an end
        assert length >= one.borders[-1]


@pytest.mark.parametrize("kind", EVERY)
@given(data=st.data())
def test_flipped_bits(kind: str, data: st.DataObject) -> None:
    """Without checksums a page's own bytes may arrive changed; nothing worse may happen."""
    one = recorded(kind)
    wire = bytearray(one.wire)
    for at in data.draw(st.lists(offsets(one), min_size=1, max_size=4, unique=True)):
        wire[at] ^= data.draw(st.integers(1, 255))
    check(play(one, bytes(wire)), one, bytes(wire))


@pytest.mark.parametrize("kind", FRAMED)
@given(data=st.data())
def test_with_checksums_no_damage_is_ever_taken_for_data(kind: str, data: st.DataObject) -> None:
    """Flipped, lost, repeated inside the frames: it fails, and all that came is right."""
    one = recorded(kind)
    assert one.framed_from is not None
    wire = bytearray(one.wire)
    at = data.draw(st.integers(one.framed_from, len(wire) - 1))
    length = data.draw(st.integers(1, min(5000, len(wire) - at)))
    match data.draw(st.sampled_from(["flip", "lose", "repeat", "swap"])):
        case "flip":
            wire[at] ^= data.draw(st.integers(1, 255))
        case "lose":
            del wire[at : at + length]
        case "repeat":
            wire[at:at] = wire[at : at + length]
        case _:
            wire[at : at + 1] = bytes([wire[at] ^ 0xFF])
            wire[-1:] = bytes([wire[-1] ^ 0xFF])
    assume(not wire.startswith(one.wire))  # more behind the end is nobody's business
    outcome = play(one, bytes(wire))
    check(outcome, one, bytes(wire))
    check_pages(outcome, one)
    assert outcome.status in ENDS
    if not outcome.error.startswith(_PLACELESS):
        assert "frame" in outcome.error


@given(data=st.binary(max_size=300), kind=st.sampled_from(KINDS))
def test_anything_behind_a_good_beginning(data: bytes, kind: str) -> None:
    """Garbage from some border on."""
    one = recorded(kind)
    wire = one.wire[: one.borders[len(data) % len(one.borders)]] + data
    check(play(one, wire), one, wire)


# -- streams of real QEMUs ------------------------------------------------------------------------


@cache
def from_qemu(version: str, name: str) -> Recording:
    """A recorded precopy of a machine without devices; ``ram`` as a whole is not known here."""
    wire = content(recording(version, name).to_destination[0])
    mib = int(name.rpartition("-")[2].removesuffix("m"))
    options = {"machine_type": "none", "smp": 0, "fill_share": 0.0, "ram_bytes": mib << 20}
    return Recording(options, False, wire, None, tuple(range(min(len(wire), 300))), {})


@pytest.mark.parametrize(("version", "name"), QEMU)
def test_a_stream_of_a_real_qemu(version: str, name: str) -> None:
    one = from_qemu(version, name)
    outcome = play(one, one.wire)
    assert (outcome.status, outcome.error) == ("completed", "")


@pytest.mark.parametrize(("version", "name"), QEMU)
@settings(max_examples=settings().max_examples // 4)
@given(data=st.data())
def test_a_damaged_stream_of_a_real_qemu(version: str, name: str, data: st.DataObject) -> None:
    one = from_qemu(version, name)
    wire = bytearray(one.wire)
    at = data.draw(offsets(one))
    if data.draw(st.booleans()):
        del wire[at:]
    else:
        wire[at] ^= data.draw(st.integers(1, 255))
    check(play(one, bytes(wire)), one, bytes(wire))


def test_a_machine_of_another_shape_is_refused_by_name() -> None:
    """The stream is whole, and yet not for this machine."""
    one = recorded("precopy")
    other = {**one.options, "extra_blocks": (("third", 3 * TARGET_PAGE_BYTES),)}
    outcome = play(Recording(other, False, one.wire, None, one.borders, one.ram), one.wire)
    assert outcome.status == "failed"
    assert "'third'" in outcome.error or "'second'" in outcome.error
