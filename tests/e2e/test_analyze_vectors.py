"""Every stream a real QEMU wrote is taken apart to its last byte, and its RAM is what it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import pytest

from migration.analyze.diff import Snapshot, differences
from migration.analyze.events import (
    CommandEvent,
    ConfigurationEvent,
    CutEvent,
    DescriptionEvent,
    EndEvent,
    ErrorEvent,
    Event,
    HeaderEvent,
    MultifdEvent,
    RamBlockEvent,
    ReturnPathEvent,
    SectionEvent,
)
from migration.analyze.image import BlockImage
from migration.analyze.pagemap import BlockState
from migration.analyze.ram import ImageFactory
from migration.analyze.session import Session
from migration.analyze.source import open_source
from migration.analyze.state import MigrationState
from tests.support.analyze_vectors import (
    SWEEPS,
    Recording,
    content,
    expected_ram,
    recordings,
)


def each_recording(wanted: Callable[[Recording], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Run a test on all recordings it makes sense for."""
    found = [each for each in recordings() if wanted(each)]
    return pytest.mark.parametrize("recording", found, ids=lambda each: each.id)


def has_known_ram(recording: Recording) -> bool:
    """What the guest had in RAM is documented, and was sent."""
    if "ignore-shared" in recording.name:
        return False
    return recording.name in SWEEPS or expected_ram(recording.name) is not None


@contextmanager
def opened(
    paths: list[Path], return_paths: Sequence[Path] = (), image_for: ImageFactory | None = None
) -> Iterator[Session]:
    """The channels in these files, together."""
    with ExitStack() as stack:
        sources = [stack.enter_context(open_source(str(path))) for path in paths]
        returns = [stack.enter_context(open_source(str(path))) for path in return_paths]
        yield Session(sources, returns, image_for=image_for)


def analyse(recording: Recording) -> list[Event]:
    """All channels of a recording together."""
    with opened(recording.to_destination, recording.to_source) as session:
        return list(session.events())


def analyse_main(recording: Recording) -> list[Event]:
    """The first main channel alone."""
    with opened(recording.to_destination[:1]) as session:
        return list(session.events())


def tiles(events: list[Event]) -> list[tuple[int, int]]:
    """(offset, end) of everything on the main channel outside packages, in order."""
    found: list[tuple[int, int]] = []
    for event in events:
        match event:
            case HeaderEvent(_, offset):
                found.append((offset, offset + 8))
            case SectionEvent() | CommandEvent() if event.in_package:
                continue
            case ConfigurationEvent() | SectionEvent() | CommandEvent() | DescriptionEvent():
                end = event.offset + event.length
                if isinstance(event, CommandEvent) and event.name == "PACKAGED":
                    end += cast(int, event.values["length"])
                found.append((event.offset, end))
    return found


@each_recording()
def test_every_byte_is_explained(recording: Recording) -> None:
    """Nothing between two things, nothing after the end; a cut only where the recording was cut."""
    events = analyse(recording)
    assert isinstance(events[-1], EndEvent), events[-1]
    assert events[-1].trailing == 0
    cuts = [event for event in events if isinstance(event, CutEvent)]
    assert bool(cuts) == recording.is_cut
    assert not any(isinstance(event, ErrorEvent) for event in events)


@each_recording(lambda each: not each.is_cut)
def test_the_main_channel_is_tiled_without_a_gap(recording: Recording) -> None:
    """Offset plus length is where the next thing starts; only the EOF byte has no line."""
    main = recording.to_destination[0]
    events = analyse_main(recording)
    found = tiles(events)
    size = len(content(main))
    gaps = [
        (end, start)
        for (_, end), (start, _) in zip(found, [*found[1:], (size, size)], strict=True)
        if end != start
    ]
    last = cast(EndEvent, events[-1]).offset
    assert last == size
    eof = [(at, at + 1) for at, _ in gaps]
    assert gaps == eof
    assert len(gaps) == 1, "the EOF byte and nothing else"
    assert content(main)[gaps[0][0]] == 0


@each_recording(lambda each: each.is_cut)
def test_a_cut_channel_alone_is_good_up_to_the_cut(recording: Recording) -> None:
    """The error is at the last byte, in the section that was cut, with the last good one named."""
    main = recording.to_destination[0]
    events = analyse_main(recording)
    error = events[-1]
    assert isinstance(error, ErrorEvent)
    assert error.section == "ram"
    assert 0 <= len(content(main)) - error.offset < 4096 + 300
    assert error.last_good is not None
    assert error.last_good["name"] in ("ram", "PING")


@each_recording(has_known_ram)
def test_ram_is_what_it_was(recording: Recording, tmp_path: Path) -> None:
    """Over all channels and kinds of records, the collected content equals what the guest had."""
    sweep = SWEEPS.get(recording.name)
    block = sweep.block if sweep else "ram"
    expected = None if sweep else expected_ram(recording.name)
    if recording.name == "none-multifd-zstd-2m":
        pytest.importorskip("zstandard")
    path = tmp_path / "ram"

    def image_for(state: BlockState) -> BlockImage | None:
        if state.idstr != block:
            return None
        return BlockImage(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))

    with opened(recording.to_destination, image_for=image_for) as session:
        for event in session.events():
            if isinstance(event, RamBlockEvent) and event.block.idstr == block:
                session.state.ram.images[block].set_length(event.block.used_length)
        session.state.ram.images[block].close()
    ram = path.read_bytes()
    if sweep is not None:
        assert sweep.holds_for(ram)
    else:
        assert ram == expected


@each_recording()
def test_devices_are_decoded_wherever_they_are_described(recording: Recording) -> None:
    """With a description no device is left raw; without one, in packages, timer and globalstate."""
    events = analyse(recording)
    is_described = any(isinstance(event, DescriptionEvent) for event in events)
    devices = {
        event.header.idstr: event.device
        for event in events
        if isinstance(event, SectionEvent) and event.device is not None
    }
    if "noglobalstate" not in recording.name:
        assert devices["globalstate"]["size"] in (len("running") + 1, len("prelaunch") + 1, 7)
    assert "cpu_clock_offset" in devices["timer"]
    raw = [name for name, device in devices.items() if "raw" in device]
    assert not (is_described and raw)


@each_recording(lambda each: each.has_multifd_channels)
def test_multifd_channels_meet_the_main_channel_at_every_sync(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main channel's sync points are as many as the SYNC packets on each channel."""
    if not any(
        "multifd" in path.name and ".ch1." in path.name for path in recording.to_destination
    ):
        pytest.skip("no multifd channels")
    met = 0
    sync = MigrationState.sync_multifd

    def count(state: MigrationState) -> None:
        nonlocal met
        met += 1
        sync(state)

    monkeypatch.setattr(MigrationState, "sync_multifd", count)
    channels = [event for event in analyse(recording) if isinstance(event, MultifdEvent)]
    assert channels
    assert [channel.values["syncs"] for channel in channels] == [met] * len(channels)


@each_recording()
def test_a_stream_does_not_differ_from_itself(recording: Recording) -> None:
    """--diff of a migration with itself finds nothing."""
    with ExitStack() as stack:
        sides = []
        for _ in range(2):
            side = Snapshot(stack)
            with opened(recording.to_destination, image_for=side.image_for) as session:
                for event in session.events():
                    side.feed(event)
            assert side.error is None
            sides.append(side)
        assert list(differences(*sides)) == []


@each_recording(lambda each: any(path.stat().st_size for path in each.to_source))
def test_the_return_path_alone_is_recognised(recording: Recording) -> None:
    """Given as FILE, not as --return-path, it is told apart by its bytes."""
    files = [path for path in recording.to_source if path.stat().st_size]
    for path in files:
        data = content(path)
        with opened([path]) as session:
            events = list(session.events())
        messages = [event for event in events if isinstance(event, ReturnPathEvent)]
        assert sum(event.length for event in messages) == len(data)
