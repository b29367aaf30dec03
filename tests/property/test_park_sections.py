"""Device sections of any machine: cut whole out of any stream that comes in any pieces."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from migration.park.sections import OpaqueSection, PrecopyTail, in_package
from migration.wire import headers
from migration.wire.commands import Ping, PostcopyListen, PostcopyRun, write_command
from migration.wire.constants import SectionType
from migration.wire.headers import SectionHeader
from migration.wire.io import BytesWriter

names = st.text("abcdefghijklmnopqrstuvwxyz/:.-0123456789", min_size=1, max_size=40)
# Bytes that look like footers, ends and section starts are more likely than chance has them.
payloads = st.lists(
    st.one_of(st.binary(max_size=60), st.sampled_from([b"\x7e", b"\x00\x06", b"\x04", bytes(9)])),
    max_size=6,
).map(b"".join)
sections = st.lists(
    st.builds(OpaqueSection, names, st.integers(0, 9), st.integers(0, 99), payloads),
    min_size=1,
    max_size=6,
)


def write_sections(out: BytesWriter, wanted: list[OpaqueSection]) -> None:
    for number, each in enumerate(wanted):
        header = SectionHeader(
            SectionType.FULL, number, each.idstr, each.instance_id, each.version_id
        )
        headers.write_section_header(out, header)
        out.write(each.payload)
        headers.write_footer(out, number)


def describe(wanted: list[OpaqueSection]) -> bytes:
    devices = [
        {
            "name": each.idstr,
            "instance_id": each.instance_id,
            "version": each.version_id,
            "size": len(each.payload),
            "fields": [{"name": "data", "size": len(each.payload), "type": "buffer"}],
        }
        for each in wanted
    ]
    return json.dumps({"page_size": 4096, "devices": devices}).encode()


@given(sections, st.lists(st.integers(1, 50), max_size=20))
def test_the_tail_of_a_precopy_in_any_pieces(wanted: list[OpaqueSection], cuts: list[int]) -> None:
    """Known as soon as the last byte is there, and not before."""
    out = BytesWriter()
    write_sections(out, wanted)
    headers.write_end_of_stream(out)
    description = describe(wanted)
    headers.write_vmdescription(out, description)
    data = out.getvalue()
    tail, at = PrecopyTail(1 << 20), 0
    for cut in cuts:
        piece = data[at : min(at + cut, len(data) - 1)]
        tail.feed(piece)
        at += len(piece)
        assert tail.sections() is None
    tail.feed(data[at:])
    assert tail.sections() == wanted
    assert tail.description == description


@given(sections, st.integers(0, 0xFFFFFFFF))
def test_a_package(wanted: list[OpaqueSection], value: int) -> None:
    """LISTEN, sections, PING, RUN; footers alone tell where a section ends, so payloads that
    hold a whole footer and a next section's start are left to the analyser's own tests."""
    if any(b"\x7e" in each.payload for each in wanted):
        return
    out = BytesWriter()
    write_command(out, PostcopyListen())
    write_sections(out, wanted)
    write_command(out, Ping(value))
    write_command(out, PostcopyRun())
    first, *found, ping, run = list(in_package(out.getvalue()))
    assert (first, ping, run) == (PostcopyListen(), Ping(value), PostcopyRun())
    assert found == wanted
