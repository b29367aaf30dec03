"""Channels together: roles by first bytes, recovery, our own frames, live sections, JSON lines."""

from __future__ import annotations

import json

import pytest

from migration.analyze.events import CutEvent, EndEvent, ErrorEvent, Event, SectionEvent
from migration.analyze.session import Role, RoleError, Session, find_role
from migration.wire.commands import (
    DiscardRange,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    RecvBitmap,
)
from migration.wire.constants import MULTIFD_MAGIC, SectionType
from migration.wire.extension import ACCEPT, CHOSEN, HELLO, HELLO_OURS, OFFER, Feature
from migration.wire.io import BytesWriter
from migration.wire.ram_setup import RamSetupBlock
from migration.wire.return_path import (
    Pong,
    RecvBitmapReply,
    RequestPages,
    ResumeAck,
    ReturnPathMessage,
    Shut,
    write_received_bitmap,
    write_rp,
)
from tests.support.analyze_streams import (
    PAGE,
    StreamBuilder,
    analyse,
    frames,
    page,
    source_of,
    zero,
)

A = b"a" * PAGE
RAM = RamSetupBlock("ram", 8 * PAGE)


def messages(*each: ReturnPathMessage) -> bytes:
    """Return-path messages."""
    writer = BytesWriter()
    for message in each:
        write_rp(writer, message)
    return writer.getvalue()


def lines(events: list[Event], *kinds: str) -> list[dict[str, object]]:
    """The JSON lines, all or of these kinds; every one survives the trip through text."""
    found = [json.loads(json.dumps(event.to_json())) for event in events]
    return [line for line in found if not kinds or line["kind"] in kinds]


def postcopy(package: bytes | None = None) -> StreamBuilder:
    """A stream up to and with the package."""
    if package is None:
        inner = StreamBuilder(has_header=False).command(PostcopyListen(), Ping(3), PostcopyRun())
        package = inner.data
    stream = StreamBuilder().command(OpenReturnPath(), Ping(1), PostcopyAdvise(PAGE, PAGE))
    stream.ram_start(RAM).command(RamDiscard("ram", (DiscardRange(0, 8 * PAGE),)))
    return stream.command(Packaged(len(package))).raw(package)


@pytest.mark.parametrize(
    ("data", "role"),
    [
        (b"QEVM\0\0\0\3", Role.MAIN),
        (b"QEVM\0\0\0\2", Role.MAIN),
        (bytes(5000) + b"QEVM\0\0\0\3", Role.MAIN),
        (MULTIFD_MAGIC.to_bytes(4, "big") + bytes(60), Role.MULTIFD),
        (StreamBuilder(has_header=False).command(RecvBitmap("ram")).data, Role.RECOVERY),
        (frames(StreamBuilder(has_header=False).command(RecvBitmap("ram")).data), Role.RECOVERY),
        (page(0, A, "ram"), Role.PREEMPT),
        (zero(0, "ram"), Role.PREEMPT),
        (bytes(7) + b"\x10", Role.PREEMPT),
        (messages(Pong(1)), Role.RETURN_PATH),
        (messages(RequestPages(0, PAGE, "ram")), Role.RETURN_PATH),
        (messages(RecvBitmapReply("ram")), Role.RETURN_PATH),
        (b"", Role.EMPTY),
        (b"\x7fELF" + bytes(100), Role.UNKNOWN),
        (b"\x08", Role.UNKNOWN),
    ],
)
def test_roles(data: bytes, role: Role) -> None:
    """From the first bytes alone."""
    assert find_role(source_of(data)) is role


@pytest.mark.parametrize(
    ("channels", "reason"),
    [
        ((b"QEVM\0\0\0\3", b"QEVM\0\0\0\3"), "one migration at a time"),
        ((page(0, A, "ram"),), "the main channel is missing"),
        ((b"QEVM\0\0\0\3", b"\x7fELF" + bytes(100)), "not a migration stream"),
    ],
)
def test_files_that_do_not_belong_together(channels: tuple[bytes, ...], reason: str) -> None:
    """Refused before anything is read."""
    with pytest.raises(RoleError, match=reason):
        Session([source_of(each) for each in channels])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file ends"),
        (b"\x7fELF" + bytes(100), "not a migration stream (magic 0x7f454c46)"),
    ],
)
def test_a_lone_file_that_is_no_stream_gets_an_error_with_a_place(
    data: bytes, message: str
) -> None:
    """As any other damage."""
    error = analyse(data)[-1]
    assert isinstance(error, ErrorEvent)
    assert (error.offset, error.section) == (0, "header")
    assert message in error.message


def test_recovery_goes_on_where_the_cut_was() -> None:
    """The sections' ids of the first channel stay valid; the cut is shown and is no error."""
    first = postcopy().ram_part(page(0, A, "ram"), page(PAGE, A)).data[: -PAGE // 2]
    page_at = first.rindex(A[:8], 0, first.rindex((PAGE | 0x28).to_bytes(8, "big")) + 16)
    second = StreamBuilder(has_header=False).command(RecvBitmap("ram"), PostcopyResume())
    second.ram_part(page(PAGE, A, "ram"), zero(2 * PAGE)).ram_end().end(None)
    bitmap = BytesWriter()
    write_rp(bitmap, RecvBitmapReply("ram"))
    write_received_bitmap(bitmap, b"\x01", 8)
    back = bitmap.getvalue() + messages(ResumeAck(), Shut(0))
    events = analyse(first, second.data, return_path=back)
    assert isinstance(events[-1], EndEvent), events[-1]
    cut = next(event for event in events if isinstance(event, CutEvent))
    assert (cut.offset, cut.section) == (page_at, "ram")
    reply = lines(events, "return-path")[0]
    assert reply["name"] == "RECV_BITMAP"
    assert (reply["bitmap_bytes"], reply["received"]) == (8, 1)
    assert [line["role"] for line in lines(events, "channel")] == [
        "main",
        "recovery",
        "return-path",
    ]


def test_a_recovery_channel_alone_says_what_is_missing() -> None:
    """Its PARTs refer to a START it does not have."""
    second = StreamBuilder(has_header=False).command(RecvBitmap("ram"), PostcopyResume())
    error = analyse(second.ram_part().data)[-1]
    assert isinstance(error, ErrorEvent)
    assert "unknown section id 2" in error.message


def test_frames_are_taken_off_from_the_byte_after_the_choice() -> None:
    """In both directions; the handshake's pings are explained."""
    plain = StreamBuilder().command(OpenReturnPath(), Ping(HELLO), Ping(1), Ping(OFFER | 7))
    plain.command(Ping(CHOSEN | Feature.CHECKSUM))
    framed = (
        StreamBuilder(has_header=False).ram_start(RAM).ram_part(page(0, A, "ram")).ram_end().end()
    )
    data = plain.data + frames(framed.data, 700)
    pongs = messages(Pong(HELLO), Pong(HELLO_OURS), Pong(1), Pong(OFFER | 7), Pong(ACCEPT | 3))
    back = pongs + messages(Pong(CHOSEN | 1)) + frames(messages(Pong(2), Shut(0)))
    events = analyse(data, return_path=back)
    assert isinstance(events[-1], EndEvent), events[-1]
    assert events[-1].offset == len(data)
    assert [line.get("handshake") for line in lines(events, "command")] == [
        None,
        "hello",
        None,
        "offer",
        "chosen",
    ]
    assert lines(events, "command")[-1]["features"] == ["checksum"]
    assert [line["name"] for line in lines(events, "return-path")][-2:] == ["PONG", "SHUT"]
    at = len(plain.data) + 300
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    error = analyse(damaged)[-1]
    assert isinstance(error, ErrorEvent)
    assert (error.offset, error.section) == (len(plain.data), "frame 0")


def test_a_choice_without_an_offer_is_an_ordinary_ping() -> None:
    """Somebody else's value."""
    stream = StreamBuilder().command(OpenReturnPath(), Ping(CHOSEN | 1)).ram_start(RAM).ram_end()
    assert isinstance(analyse(stream.end().data)[-1], EndEvent)


def test_trailing_bytes_are_counted() -> None:
    """They belong to nobody; the stream is still complete."""
    end = analyse(StreamBuilder().end().data + bytes(77))[-1]
    assert isinstance(end, EndEvent)
    assert end.to_json() == {"kind": "end", "offset": 16, "trailing": 77}


def test_dirty_bitmap_chunks() -> None:
    """Flags of one, two and four bytes; names only where they change; zeroes and data."""
    start = b"\x1c\x05disk0\x03bm0" + (65536).to_bytes(4, "big") + b"\x03"
    bits = b"\x40" + bytes(8) + (2048).to_bytes(4, "big") + (8).to_bytes(8, "big") + bytes(8)
    wide = b"\x80\x42" + bytes(8) + (1).to_bytes(4, "big")
    payload = start + bits + b"\x42" + bytes(8) + (1).to_bytes(4, "big") + b"\x20\x01"
    stream = StreamBuilder().section(SectionType.START, 3, "dirty-bitmap", payload).end()
    section = next(event for event in analyse(stream.data) if isinstance(event, SectionEvent))
    assert section.live == {
        "chunk_count": 5,
        "chunks": [
            {
                "node": "disk0",
                "bitmap": "bm0",
                "granularity": 65536,
                "enabled": True,
                "persistent": True,
            },
            {"first_sector": 0, "sectors": 2048, "bytes": 8},
            {"first_sector": 0, "sectors": 1, "zeroes": True},
            {"complete": True},
        ],
    }
    stream = StreamBuilder().section(SectionType.START, 3, "dirty-bitmap", wide).end()
    error = analyse(stream.data)[-1]
    assert isinstance(error, ErrorEvent)
    assert error.section == "dirty-bitmap"


def test_block_migration_records() -> None:
    """Chunks per device, progress, end; of QEMU up to 9.0."""
    device = b"\x05disk0"
    records = [
        (0x01).to_bytes(8, "big") + device + bytes(1 << 20),
        (2048 << 9 | 0x09).to_bytes(8, "big") + device,
        (100 << 9 | 0x04).to_bytes(8, "big"),
        (0x02).to_bytes(8, "big"),
    ]
    stream = StreamBuilder().section(SectionType.START, 3, "block", b"".join(records)).end()
    section = next(event for event in analyse(stream.data) if isinstance(event, SectionEvent))
    assert section.live == {"chunks": {"disk0": 2}, "progress_percent": 100}


def test_live_sections_nobody_knows_are_cut_by_their_footer() -> None:
    """START, PART and END."""
    stream = StreamBuilder().section(SectionType.START, 3, "vfio", b"abc")
    stream.section(SectionType.PART, 3, "vfio", b"").section(SectionType.END, 3, "vfio", bytes(9))
    events = analyse(stream.end().data)
    assert isinstance(events[-1], EndEvent)
    live = [event.live for event in events if isinstance(event, SectionEvent)]
    assert live == [{"bytes": 3}, {"bytes": 0}, {"bytes": 9}]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (RamDiscard("rom", (DiscardRange(0, PAGE),)), "unknown block 'rom'"),
        (RamDiscard("ram", (DiscardRange(0, 9 * PAGE),)), "in block 'ram'"),
        (RamDiscard("ram", (DiscardRange(1, PAGE),)), "in block 'ram'"),
        (PostcopyAdvise(PAGE, 3), "target page of 0x3 bytes"),
        (PostcopyAdvise(PAGE, 1 << 40), "target page of"),
    ],
)
def test_commands_that_contradict_the_stream(
    command: RamDiscard | PostcopyAdvise, reason: str
) -> None:
    """At the command's offset."""
    stream = StreamBuilder().ram_start(RAM)
    at = len(stream.data)
    error = analyse(stream.command(command).data)[-1]
    assert isinstance(error, ErrorEvent)
    assert error.offset == at
    assert reason in error.message


def test_a_package_inside_a_package() -> None:
    """Not legal, and no way to nest without end."""
    inner = StreamBuilder(has_header=False).command(Packaged(0)).data
    error = analyse(postcopy(inner).data)[-1]
    assert isinstance(error, ErrorEvent)
    assert "a package inside a package" in error.message


def test_the_error_line_names_the_last_good_section() -> None:
    """With type and offset."""
    stream = StreamBuilder().ram_start(RAM).ram_part(zero(0, "ram"))
    at = stream.data.rindex(b"\x02\0\0\0\2")
    error = lines(analyse(stream.raw(b"\x99").data), "error")[0]
    assert error["offset"] == len(stream.data) - 1
    assert error["section"] is None
    assert error["last_good"] == {"name": "ram", "type": "part", "offset": at}
    assert "0x99 is not a section type after section 'ram'" in str(error["message"])


def test_json_lines_have_the_promised_shape() -> None:
    """One of each kind, in stream order."""
    stream = StreamBuilder().command(Ping(1)).ram_start(RAM).ram_part(page(0, A, "ram")).ram_end()
    found = lines(analyse(stream.full(9, "dev", b"ab").end().data))
    assert [line["kind"] for line in found] == [
        *("header", "command", "section", "section", "section", "section"),
        *("description", "ram-block", "end"),
    ]
    assert found[0] == {"kind": "header", "version": 3}
    assert found[1] == {"kind": "command", "offset": 8, "name": "PING", "value": 1}
    device = found[5]
    assert device == {
        "kind": "section",
        "type": "full",
        "offset": device["offset"],
        "length": 1 + 4 + 4 + 8 + 2 + 5,
        "id": 9,
        "name": "dev",
        "instance": 0,
        "version": 1,
        "device": {"raw": "6162", "bytes": 2},
    }
    assert found[7] == {
        "kind": "ram-block",
        "name": "ram",
        "length": 8 * PAGE,
        "page_size": PAGE,
        "pages": {"normal": 1, "zero": 0, "resent": 0},
    }
    assert found[8] == {"kind": "end", "offset": len(stream.data)}
