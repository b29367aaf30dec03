"""Recorded streams decoded to values and encoded again are the same bytes; changed ones say so."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from migration.analyze.events import EndEvent, SectionEvent
from migration.analyze.rewrite import Edit, rewrite_stream
from migration.analyze.session import Session
from migration.analyze.source import open_source
from migration.commands.main import main
from migration.wire.errors import LocalStreamError, RemoteStreamError
from migration.wire.vmdesc import (
    DecodedDevice,
    DecodedField,
    DecodedStruct,
    decode_device,
    describe_device,
)
from tests.support.analyze_vectors import Recording, content, recording, recordings
from tests.support.vmstate_vectors import Section, described_streams

_SECTIONS = [section for stream in described_streams() for section in stream.sections]


def has_free_places(each: Recording) -> bool:
    """A whole main channel whose pages lie where they come, not at fixed places."""
    return not each.is_cut and "mapped-ram" not in each.name


def rewritten(path: Path, edit: Edit | None = None) -> bytes:
    out = io.BytesIO()
    rewrite_stream(path, out, edit)
    return out.getvalue()


def leave(device: DecodedDevice) -> None:
    """An edit that changes nothing: the description is still written anew."""


def stream_of(each: Recording) -> bytes:
    """The main channel, without what the file has in front of it."""
    data = content(each.to_destination[0])
    return data[data.index(b"QEVM") :]


@pytest.mark.parametrize("edit", [None, leave], ids=["as it is", "described anew"])
@pytest.mark.parametrize(
    "each", [each for each in recordings() if has_free_places(each)], ids=lambda each: each.id
)
def test_a_recording_comes_out_as_it_went_in(
    tmp_path: Path, each: Recording, edit: Edit | None
) -> None:
    out, stream = rewritten(each.to_destination[0], edit), stream_of(each)
    if "-compress-" not in each.name:
        assert out == stream
        return
    # Another zlib may pack the same page otherwise: then only what is in it is the same.
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(stream)
    two.write_bytes(out)
    assert main(["analyze", str(one), "--diff", str(two)]) == 0


@pytest.mark.parametrize("section", _SECTIONS, ids=lambda section: section.header.idstr)
def test_a_device_is_described_as_qemu_described_it(section: Section) -> None:
    device = decode_device(section.description, section.payload)
    assert describe_device(device) == json.dumps(section.description)


def test_a_changed_value_changes_the_stream_in_one_place(tmp_path: Path) -> None:
    each = recording("7.2", "pc-running-kvm-8m")

    def change(device: DecodedDevice) -> None:
        if device.name == "cpu":
            device.state["env.eip"] = 0x1234

    before, after = stream_of(each), rewritten(each.to_destination[0], change)
    assert len(before) == len(after)
    differ = [at for at in range(len(before)) if before[at] != after[at]]
    assert 1 <= len(differ) <= 8
    assert device_of(after, tmp_path, "cpu")["env.eip"] == 0x1234


def device_of(stream: bytes, folder: Path, name: str) -> dict[str, object]:
    """The device's fields as the analyser shows them; the stream must be whole."""
    path = folder / "stream"
    path.write_bytes(stream)
    with open_source(str(path)) as source:
        events = list(Session([source]).events())
    assert isinstance(events[-1], EndEvent), events[-1]
    assert events[-1].offset == len(stream)
    for event in events:
        if isinstance(event, SectionEvent) and event.header.idstr == name:
            assert event.device is not None
            return event.device
    raise KeyError(name)


def test_added_and_renamed_parts_are_described(tmp_path: Path) -> None:
    """A stream of another length, and its description fits it."""
    each = recording("7.2", "pc-running-kvm-8m")
    extra = DecodedField("note", "uint32", 0, b"", 7, 4)

    def change(device: DecodedDevice) -> None:
        if device.name == "pckbd":
            device.state.subsections.append(DecodedStruct("pckbd/more", 1, 0, [extra]))
        if device.name == "port92":
            device.name = "port93"

    out = rewritten(each.to_destination[0], change)
    assert len(out) > len(stream_of(each))
    assert device_of(out, tmp_path, "pckbd")["pckbd/more"] == {"note": 7}
    assert device_of(out, tmp_path, "port93")


def test_a_value_that_does_not_fit_is_named() -> None:
    def change(device: DecodedDevice) -> None:
        if device.name == "cpu":
            device.state["env.eip"] = 1 << 64

    with pytest.raises(LocalStreamError, match=r"section 'cpu': field env\.eip: .* does not fit"):
        rewritten(recording("7.2", "pc-running-kvm-8m").to_destination[0], change)


def test_only_a_lone_field_can_be_set() -> None:
    one = DecodedStruct("s", 1, 0, [DecodedField("a", "uint8", 0, b"", 1, 1)])
    one["a"] = 2
    assert one["a"] == 2
    with pytest.raises(KeyError):
        one["b"] = 1
    one.fields.append(DecodedField("a", "uint8", 0, b"", 1, 1))
    with pytest.raises(KeyError):
        one["a"] = 3


@pytest.mark.parametrize(
    ("version", "name", "match"),
    [
        ("7.2", "none-postcopy-recover-2m", "the file ends"),
        ("10.0", "none-mapped-ram-2m", "mapped-ram is not rewritten"),
    ],
)
def test_what_is_not_rewritten(version: str, name: str, match: str) -> None:
    with pytest.raises(RemoteStreamError, match=match):
        rewritten(recording(version, name).to_destination[0])
