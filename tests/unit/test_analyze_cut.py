"""Where device sections end: look-alikes, the description's last word, streams without footers."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from migration.analyze.cut import read_to_footer
from migration.analyze.events import EndEvent, ErrorEvent, Event, SectionEvent
from migration.analyze.session import Session
from migration.wire.commands import (
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
)
from migration.wire.constants import SectionType
from migration.wire.errors import RemoteStreamError
from migration.wire.headers import SectionHeader
from migration.wire.ram_setup import RamSetupBlock
from tests.support.analyze_streams import PAGE, StreamBuilder, analyse, source_of, zero

HEADER = SectionHeader(SectionType.FULL, 9, "dev", 0, 1)
RAM = SectionHeader(SectionType.START, 2, "ram", 0, 4)
MARK = b"\x7e\0\0\0\x09"


def described(*devices: tuple[str, int]) -> bytes:
    """A description with one opaque field per device."""
    entries = [
        {
            "name": name,
            "instance_id": 0,
            "vmsd_name": name,
            "version": 1,
            "fields": [{"name": "data", "type": "buffer", "size": size}],
        }
        for name, size in devices
    ]
    return json.dumps({"page_size": PAGE, "devices": entries}).encode()


def devices(events: list[Event]) -> list[tuple[str, object]]:
    """(name, fields) of the device sections."""
    return [
        (event.header.idstr, event.device)
        for event in events
        if isinstance(event, SectionEvent) and event.device is not None
    ]


def full(section_id: int, idstr: str, payload: bytes) -> bytes:
    """A FULL section's bytes."""
    return StreamBuilder(has_header=False).full(section_id, idstr, payload).data


@pytest.mark.parametrize(
    "following",
    [
        full(10, "next", b""),
        b"\x08\0\x02\0\x04\0\0\0\x03",
        b"\x02\0\0\0\x02",
        b"\x00\x06\0\0\0\x02{}",
        b"\x00",
        b"",
    ],
)
def test_a_footer_ends_where_something_legal_follows(following: bytes) -> None:
    """A section, a command, a live section that was started, the end."""
    source = source_of(b"payload" + MARK + following)
    assert read_to_footer(source, HEADER, {2: RAM}, 1 << 20) == b"payload"
    assert source.peek(5) == MARK


@pytest.mark.parametrize(
    "following",
    [
        b"\x05\x03abc",  # a subsection belongs into a payload
        b"\x04\0\0\0\x09\x03dev" + bytes(8),  # its own id again
        b"\x04\0\0\0\x0a\0" + bytes(8),  # no name
        b"\x04\0\0\0\x0a\x03d\x01v" + bytes(8),  # no text
        b"\x04\0\0\0\x0a\x03dev\0\0\0\0\xff\0\0\0",  # an absurd version
        b"\x04\0\0\0\x02\x03dev" + bytes(8),  # the id of a live section
        b"\x02\0\0\0\x07",  # never started
        b"\x08\0\x63\0\0",  # no such command
        b"\x08\0\x02\0\x05",  # PING has 4 bytes
        b"\x00\x05",  # EOF, then no description
        b"\x00\x06\0\0\0\x02[]",  # no JSON object
        b"\x07",
        b"\xff",
    ],
)
def test_look_alikes_inside_a_payload_are_passed_over(following: bytes) -> None:
    """The footer's five bytes alone prove nothing."""
    payload = b"front" + MARK + following + b"behind"
    source = source_of(payload + MARK + full(10, "next", b""))
    assert read_to_footer(source, HEADER, {2: RAM}, 1 << 20) == payload


def test_no_footer_and_too_long_are_different_errors() -> None:
    """The bound is stated, with what would raise it."""
    with pytest.raises(RemoteStreamError, match="no footer of section id 9"):
        read_to_footer(source_of(bytes(10000)), HEADER, {}, 1 << 20)
    with pytest.raises(RemoteStreamError, match=r"more than 65536 bytes .* --hold"):
        read_to_footer(source_of(bytes(1 << 20)), HEADER, {}, 65536)


def test_a_large_section_is_found_across_many_looks() -> None:
    """The window grows; a mark on its border is not missed."""
    for length in (4083, 4091, 4092, 4096, 8190, 300_000):
        payload = bytes(length)
        source = source_of(payload + MARK + full(10, "next", b""))
        assert read_to_footer(source, HEADER, {}, 1 << 20) == payload


def test_the_description_corrects_a_wrong_cut() -> None:
    """A payload that holds a whole section, footer and all, is still one section."""
    trap = b"a" + MARK + full(10, "fake", b"bcd")[:-5]
    stream = StreamBuilder().full(9, "dev", trap).full(10, "next", b"xy")
    stream.end(described(("dev", len(trap)), ("next", 2)))
    events = analyse(stream.data)
    assert isinstance(events[-1], EndEvent)
    assert devices(events) == [("dev", {"data": trap.hex()}), ("next", {"data": b"xy".hex()})]
    first, second = [event for event in events if isinstance(event, SectionEvent)]
    assert first.offset + first.length == second.offset


def test_without_a_description_the_footers_stand() -> None:
    """Raw bytes, with their number."""
    stream = StreamBuilder().full(9, "dev", b"abc").full(10, "next", b"").end(None)
    assert devices(analyse(stream.data)) == [
        ("dev", {"raw": "616263", "bytes": 3}),
        ("next", {"raw": "", "bytes": 0}),
    ]


def test_a_description_that_lies_about_a_length_is_an_error() -> None:
    """At the section it lies about, which is then shown raw."""
    stream = StreamBuilder().full(9, "dev", b"abc").full(10, "next", b"xy")
    stream.end(described(("dev", 4), ("next", 2)))
    events = analyse(stream.data)
    error = events[-1]
    assert isinstance(error, ErrorEvent)
    assert (error.offset, error.section) == (8, "dev")
    assert "3 bytes, the description says 4" in error.message
    assert [device for _, device in devices(events)] == [
        {"raw": "616263", "bytes": 3},
        {"raw": "7879", "bytes": 2},
    ]


def test_without_footers_the_description_cuts_all_sections() -> None:
    """Also when a payload holds what looks like the end of the stream."""
    trap = b"\x00\x06\0\0\0\x02{}"
    stream = StreamBuilder(has_footers=False).ram_start(RamSetupBlock("ram", PAGE))
    stream.ram_end(zero(0, "ram")).full(9, "dev", trap).full(10, "next", b"xy")
    stream.end(described(("dev", len(trap)), ("next", 2)))
    events = analyse(stream.data)
    assert isinstance(events[-1], EndEvent), events[-1]
    assert devices(events) == [("dev", {"data": trap.hex()}), ("next", {"data": "7879"})]
    sections = [event for event in events if isinstance(event, SectionEvent)]
    assert not any(event.has_footer for event in sections)
    for one, other in pairwise(sections):
        assert one.offset + one.length == other.offset


def test_without_footers_and_description_nothing_can_be_told() -> None:
    """An error at the first device section, not a guess."""
    stream = StreamBuilder(has_footers=False).ram_start(RamSetupBlock("ram", PAGE))
    stream.ram_end().full(9, "dev", b"abc").end(None)
    error = analyse(stream.data)[-1]
    assert isinstance(error, ErrorEvent)
    assert "need a description" in error.message
    assert error.last_good is not None
    assert error.last_good["type"] == "end"


def test_device_sections_before_ram_wait_for_the_description() -> None:
    """QEMU 8.0 and later send some early; events stay in stream order."""
    stream = StreamBuilder().full(5, "early", b"abc").ram_start(RamSetupBlock("ram", PAGE))
    stream.ram_part(zero(0, "ram")).ram_end().full(9, "dev", b"xy")
    stream.end(described(("early", 3), ("dev", 2)))
    events = analyse(stream.data)
    names = [event.header.idstr for event in events if isinstance(event, SectionEvent)]
    assert names == ["early", "ram", "ram", "ram", "dev"]
    assert devices(events) == [("early", {"data": "616263"}), ("dev", {"data": "7879"})]


def test_devices_in_a_package_show_what_can_be_known() -> None:
    """Fixed layouts are decoded, subsections recognised by name, the rest is bytes."""
    sub = b"\x05\x08dev/more\0\0\0\x01!"
    package = StreamBuilder(has_header=False).command(PostcopyListen())
    package.full(0, "timer", (5).to_bytes(8, "big") + bytes(8) + (7).to_bytes(8, "big"), version=2)
    package.full(9, "0000:00:01.0/dev", b"ab" + sub).command(PostcopyRun())
    stream = StreamBuilder().command(OpenReturnPath(), Ping(1), PostcopyAdvise(PAGE, PAGE))
    stream.ram_start(RamSetupBlock("ram", PAGE)).command(Packaged(len(package.data)))
    stream.raw(package.data).ram_end().end(None)
    events = analyse(stream.data)
    assert isinstance(events[-1], EndEvent), events[-1]
    timer, device = devices(events)
    assert timer[1] == {"cpu_ticks_offset": 5, "unused": "00" * 8, "cpu_clock_offset": 7}
    assert device[1] == {
        "raw": (b"ab" + sub).hex(),
        "bytes": 2 + len(sub),
        "subsections": [{"name": "dev/more", "version": 1, "at": 2}],
    }


@pytest.mark.parametrize("section_name", [b"\x05", b"\x01"])
def test_a_package_holds_sections_and_commands_only(section_name: bytes) -> None:
    """Its errors are the package's."""
    stream = StreamBuilder().ram_start(RamSetupBlock("ram", PAGE)).command(Packaged(1))
    error = analyse(stream.raw(section_name).data)[-1]
    assert isinstance(error, ErrorEvent)
    assert error.section == "package"


def test_held_device_data_has_a_bound() -> None:
    """Also the sum of many small sections."""
    stream = StreamBuilder()
    for index in range(10):
        stream.full(index, f"dev{index}", bytes(1000))
    data = stream.end(None).data
    events = list(Session([source_of(data)], held_bytes_max=5000).events())
    error = events[-1]
    assert isinstance(error, ErrorEvent)
    assert error.section == "dev5"
    assert "--hold" in error.message
    assert len(devices(events)) == 5
