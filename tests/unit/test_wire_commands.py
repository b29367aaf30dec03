"""Commands: bytes as recorded from QEMU, and every wrong shape refused."""

from __future__ import annotations

import pytest

from migration.wire.commands import (
    Command,
    DiscardRange,
    EnableColo,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyAdviseEmpty,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    RecvBitmap,
    SwitchoverStart,
    command_name,
    read_command,
    split_discards,
    write_command,
)
from migration.wire.errors import LocalStreamError, RemoteStreamError, TruncatedStreamError
from migration.wire.io import BytesReader, BytesWriter

BYTES: list[tuple[Command, str]] = [
    (OpenReturnPath(), "08 0001 0000"),
    (Ping(0x42), "08 0002 0004 00000042"),
    (PostcopyAdvise(0x200000, 0x1000), "08 0003 0010 0000000000200000 0000000000001000"),
    (PostcopyAdviseEmpty(), "08 0003 0000"),
    (PostcopyListen(), "08 0004 0000"),
    (PostcopyRun(), "08 0005 0000"),
    (
        RamDiscard("ram", (DiscardRange(0, 0x100000),)),
        "08 0006 0016 00 03 72616d 00 0000000000000000 0000000000100000",
    ),
    (Packaged(0xC9), "08 0007 0004 000000c9"),
    (EnableColo(), "08 0008 0000"),
    (PostcopyResume(), "08 0009 0000"),
    (RecvBitmap("ram"), "08 000a 0004 03 72616d"),
    (SwitchoverStart(), "08 000b 0000"),
]


@pytest.mark.parametrize(("command", "data"), BYTES, ids=lambda each: type(each).__name__)
def test_bytes(command: Command, data: str) -> None:
    """Both ways."""
    writer = BytesWriter()
    write_command(writer, command)
    assert writer.getvalue() == bytes.fromhex(data)
    reader = BytesReader(bytes.fromhex(data)[1:])
    assert read_command(reader) == command
    assert reader.remaining == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("0000 0000", "unknown command 0"),
        ("000c 0000", "unknown command 12"),
        ("0001 0001 00", "1 too many"),
        ("0002 0003 000000", "wanted 4 bytes, 3 left"),
        ("0002 0005 0000000000", "1 too many"),
        ("0003 0008 0000000000001000", "wanted 8 bytes, 0 left"),
        ("0006 0000", "wanted 1 bytes"),
        ("0006 0016 01 03 72616d 00" + "00" * 16, "discard version 1"),
        ("0006 0006 00 03 72616d 00", "no list of ranges"),
        ("0006 0017 00 03 72616d 00" + "00" * 17, "no list of ranges"),
        ("0006 0016 00 03 72616d 01" + "00" * 16, "no NUL"),
        ("0006 0013 00 00 00" + "00" * 16, "empty block name"),
        ("0006 0014 00 01 ff 00" + "00" * 16, "not UTF-8"),
        ("0006 0016 00 03 72616d 00" + "ff" * 16, "wraps"),
        ("000a 0001 00", "empty block name"),
        ("000a 0005 03 72616d 00", "1 too many"),
    ],
)
def test_wrong_shapes_are_refused(data: str, reason: str) -> None:
    """The error says which command and where."""
    raw = bytes.fromhex(data)
    with pytest.raises(RemoteStreamError, match=reason) as caught:
        read_command(BytesReader(raw, base=1000))
    assert 1000 <= caught.value.offset <= 1000 + len(raw)
    if "unknown" not in reason:
        assert caught.value.section is not None
        assert caught.value.section.startswith("command ")


def test_a_command_cut_off_is_a_truncated_stream() -> None:
    """Told apart from a wrong one: recovery starts here."""
    with pytest.raises(TruncatedStreamError):
        read_command(BytesReader(bytes.fromhex("0002 0004 0000")))


def test_discards_are_split_at_twelve_ranges() -> None:
    """In order, as QEMU sends them; none at all for no range."""
    ranges = [DiscardRange(index * 0x2000, 0x1000) for index in range(25)]
    commands = list(split_discards("ram", ranges))
    assert [len(command.ranges) for command in commands] == [12, 12, 1]
    assert [each for command in commands for each in command.ranges] == ranges
    assert list(split_discards("ram", [])) == []


def test_what_qemu_refuses_is_not_written() -> None:
    """No range, an empty range, more than a be16 length, values past their field."""
    empty = RamDiscard("ram", (DiscardRange(0, 0),))
    many = RamDiscard("ram", (DiscardRange(0, 1),) * 4096)
    writer = BytesWriter()
    for command in (RamDiscard("ram", ()), empty, many, Ping(1 << 32), Ping(-1), RecvBitmap("")):
        with pytest.raises(LocalStreamError):
            write_command(writer, command)
    assert writer.getvalue() == b""


def test_names_are_qemus() -> None:
    """As in its trace output."""
    assert command_name(RamDiscard("ram", ())) == "POSTCOPY_RAM_DISCARD"
    assert command_name(PostcopyAdviseEmpty()) == "POSTCOPY_ADVISE"
