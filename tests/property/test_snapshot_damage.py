"""Snapshot files damaged at random: each is loaded or refused with words, and never runs half."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.runtime.errors import MigrationError
from migration.runtime.snapshots.look import MappedSnapshot
from migration.wire.errors import RemoteStreamError
from tests.support.pair import MIB, Side, side

pytestmark = pytest.mark.kernel

_STATES = frozenset({"prelaunch", "paused", "internal-error"})
_HEAD = 4 << 10


@pytest.fixture(scope="module", params=[False, True], ids=["stream", "mapped-ram"])
def saved(request: pytest.FixtureRequest) -> Iterator[tuple[Side, Path, bytes]]:
    """A machine, a folder, and a snapshot of it without a manifest."""
    with (
        tempfile.TemporaryDirectory() as folder,
        side(ram_bytes=2 * MIB, fill_share=0.1, disk_bytes=64 << 10) as one,
    ):
        directory = Path(folder)
        one.service.snapshots.directory = directory
        one.service.set_capabilities({"mapped-ram": request.param})
        one.service.savevm("good")
        (directory / "good.vmstate.json").unlink()
        yield one, directory, (directory / "good.vmstate").read_bytes()


def _load(saved: tuple[Side, Path, bytes], data: bytes) -> bool:
    one, directory, _ = saved
    (directory / "bad.vmstate").write_bytes(data)
    text = ""
    try:
        one.service.loadvm("bad")
    except MigrationError as error:
        text = str(error)
    assert not text or "nothing has changed" in text or "stays stopped" in text
    assert one.machine.run_state in _STATES
    assert not one.machine.is_running
    return not text


# Damage where structure is: in front, and in the devices at the end. Between lie pages.
_PLACES = st.one_of(st.integers(0, _HEAD), st.integers(-(128 << 10), -1))


@given(place=_PLACES, change=st.binary(min_size=1, max_size=8))
def test_bytes_changed(saved: tuple[Side, Path, bytes], place: int, change: bytes) -> None:
    """Anywhere; the machine then loads a good one as if nothing had been."""
    one, _, good = saved
    at = place % len(good)
    _load(saved, good[:at] + change + good[at + len(change) :])
    one.service.loadvm("good")
    assert one.machine.run_state == "prelaunch"


@given(place=_PLACES)
def test_cut_short(saved: tuple[Side, Path, bytes], place: int) -> None:
    """At any byte before the end of the devices it is refused."""
    one, _, good = saved
    at = place % len(good)
    end = good.rindex(b"\x00\x06")  # the EOF byte and the description behind it
    assert _load(saved, good[:at]) == (at > end)
    one.service.loadvm("good")
    assert one.machine.run_state == "prelaunch"


@given(place=st.integers(0, 400), change=st.binary(min_size=1, max_size=9))
def test_looking_at_a_damaged_file(
    saved: tuple[Side, Path, bytes], place: int, change: bytes
) -> None:
    """Typed errors, whatever the positions in it say."""
    _, directory, good = saved
    path = directory / "look"
    path.write_bytes(good[:place] + change + good[place + len(change) :])
    try:
        with MappedSnapshot(path) as snapshot:
            for idstr, area in snapshot.areas.items():
                snapshot.read(idstr, 0, min(area.used_length, 64 << 10))
    except (RemoteStreamError, MigrationError, OSError):
        return
