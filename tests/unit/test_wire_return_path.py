"""Return path: bytes as recorded from QEMU, the bitmap of a recovery, every wrong shape refused."""

from __future__ import annotations

import pytest

from migration.wire.errors import LocalStreamError, RemoteStreamError
from migration.wire.io import BytesReader, BytesWriter
from migration.wire.return_path import (
    Pong,
    RecvBitmapReply,
    RequestPages,
    ResumeAck,
    ReturnPathMessage,
    Shut,
    SwitchoverAck,
    read_received_bitmap,
    read_rp,
    received_bitmap_bytes,
    rp_name,
    write_received_bitmap,
    write_rp,
)

BYTES: list[tuple[ReturnPathMessage, str]] = [
    (Shut(0), "0001 0004 00000000"),
    (Pong(4), "0002 0004 00000004"),
    (
        RequestPages(0x154000, 0x1000, "pc.ram"),
        "0003 0013 0000000000154000 00001000 06 70632e72616d",
    ),
    (RequestPages(0, 0x40000000), "0004 000c 0000000000000000 40000000"),
    (RecvBitmapReply("ram"), "0005 0004 03 72616d"),
    (ResumeAck(), "0006 0004 00000001"),
    (SwitchoverAck(), "0007 0000"),
]


@pytest.mark.parametrize(("message", "data"), BYTES, ids=lambda each: type(each).__name__)
def test_bytes(message: ReturnPathMessage, data: str) -> None:
    """Both ways."""
    writer = BytesWriter()
    write_rp(writer, message)
    assert writer.getvalue() == bytes.fromhex(data)
    reader = BytesReader(bytes.fromhex(data))
    assert read_rp(reader) == message
    assert reader.remaining == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("0000 0000", "unknown return-path message 0"),
        ("0008 0000", "unknown return-path message 8"),
        ("0002 0201" + "00" * 513, "payload of 513 bytes"),
        ("0002 0003 000000", "wanted 4 bytes"),
        ("0002 0005 0000000000", "1 too many"),
        ("0003 000d 0000000000000000 00001000 00", "empty block name"),
        ("0003 000f 0000000000000000 00001000 03 7261", "wanted 3 bytes"),
        ("0004 000c 0000000000000000 00000000", "request"),
        ("0004 000c ffffffffffffffff 00001000", "request"),
        ("0006 0004 00000000", "not acknowledged"),
        ("0007 0001 00", "1 too many"),
    ],
)
def test_wrong_shapes_are_refused(data: str, reason: str) -> None:
    """The source treats the return path as broken."""
    with pytest.raises(RemoteStreamError, match=reason):
        read_rp(BytesReader(bytes.fromhex(data)))


def test_received_bitmap_bytes_on_the_wire() -> None:
    """Size in bytes, little-endian bits padded to 8 bytes, end mark."""
    writer = BytesWriter()
    write_received_bitmap(writer, b"\x01\x80", page_count=16)
    assert writer.getvalue() == bytes.fromhex("0000000000000008 0180000000000000 0123456789abcdef")
    assert read_received_bitmap(BytesReader(writer.getvalue()), 16) == b"\x01\x80" + bytes(6)
    assert read_received_bitmap(BytesReader(writer.getvalue())) == b"\x01\x80" + bytes(6)


@pytest.mark.parametrize(
    ("pages", "size"), [(1, 8), (64, 8), (65, 16), (512, 64), (1 << 32, 1 << 29)]
)
def test_bitmap_sizes(pages: int, size: int) -> None:
    """One bit per page, in multiples of 8 bytes."""
    assert received_bitmap_bytes(pages) == size


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("0000000000000010" + "00" * 16 + "0123456789abcdef", "bitmap of 16 bytes for 64 pages"),
        ("0000000000000008" + "00" * 8 + "0123456789abcdee", "end mark 0x0123456789abcdee"),
    ],
)
def test_wrong_bitmaps_are_refused(data: str, reason: str) -> None:
    """They would break the recovery."""
    with pytest.raises(RemoteStreamError, match=reason):
        read_received_bitmap(BytesReader(bytes.fromhex(data)), 64)


def test_an_observer_bounds_the_bitmap_itself() -> None:
    """Who does not know the block takes no absurd size, and no odd one."""
    for size in ("ffffffffffffffff", "0000000000000009"):
        with pytest.raises(RemoteStreamError, match="bitmap of"):
            read_received_bitmap(BytesReader(bytes.fromhex(size) + bytes(64)))


def test_what_does_not_fit_is_not_written() -> None:
    """Lengths are 32 bits and not 0; a bitmap is as long as its pages."""
    writer = BytesWriter()
    for message in (RequestPages(0, 1 << 32), RequestPages(0, 0), RequestPages(-1, 1), Pong(-1)):
        with pytest.raises(LocalStreamError):
            write_rp(writer, message)
    for bitmap in (b"", bytes(9)):
        with pytest.raises(LocalStreamError):
            write_received_bitmap(writer, bitmap, 64)
    assert writer.getvalue() == b""


def test_names_are_qemus() -> None:
    """The two forms of a request have names of their own."""
    assert rp_name(RequestPages(0, 1)) == "REQ_PAGES"
    assert rp_name(RequestPages(0, 1, "ram")) == "REQ_PAGES_ID"
