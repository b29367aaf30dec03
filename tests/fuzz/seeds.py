"""Writes the first inputs of every target: ``python -m tests.fuzz.seeds``."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from migration.native import crc32c
from migration.wire.commands import (
    Command,
    DiscardRange,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamDiscard,
    RecvBitmap,
    write_command,
)
from migration.wire.constants import SectionType
from migration.wire.devices.ide import IDE_DRIVE, IdeDrive
from migration.wire.devices.pckbd import PCKBD, IsaKeyboard
from migration.wire.extension import HELLO
from migration.wire.globalstate import GLOBALSTATE, GlobalState
from migration.wire.headers import (
    Configuration,
    SectionHeader,
    write_configuration,
    write_end_of_stream,
    write_file_header,
    write_footer,
    write_section_header,
    write_vmdescription,
)
from migration.wire.io import BytesWriter
from migration.wire.ram_setup import RamSetup, RamSetupBlock, write_ram_setup
from migration.wire.return_path import (
    Pong,
    RecvBitmapReply,
    RequestPages,
    ResumeAck,
    Shut,
    write_received_bitmap,
    write_rp,
)
from migration.wire.vmstate import JsonText, VMStateDescription
from tests.fuzz.targets import CORPUS
from tests.support.multifd_replay import packet, sync

SECTION_ID = 0x01020304  # as in listen_fuzz.c
PAGE = 4 << 10
ZERO, DATA, EOS, CONTINUE, XBZRLE = 2, 8, 16, 32, 64


def record(offset: int, kind: int, name: bytes | None, rest: bytes = b"") -> bytes:
    """One RAM record."""
    head = struct.pack(">Q", offset | kind | (CONTINUE if name is None else 0))
    return head + (b"" if name is None else bytes([len(name)]) + name) + rest


def crc_frame(sequence: int, payload: bytes) -> bytes:
    """One frame of the checksum extension: see csrc/chan.h."""
    seed = struct.pack(">QI", sequence, len(payload))
    return struct.pack(">II", len(payload), crc32c(payload, crc32c(seed))) + payload


def page(byte: int) -> bytes:
    """Contents of a page."""
    return bytes([byte]) * PAGE


def ramrec() -> Iterator[bytes]:
    yield record(0, DATA, b"pc.ram")
    yield record(PAGE, DATA, None)
    yield record(2 * PAGE, ZERO, b"a", b"\0")
    yield record(0, EOS & 0xFFF, b"x")[:7] + b"\x10"
    yield record(PAGE, XBZRLE, b"vga", b"\1\0\5")
    yield record(0, 0x100, b"vga", b"\0\0\1\0")
    yield record(0x200000, 4, b"x")[:8]


def xbzrle() -> Iterator[bytes]:
    yield b"\0\4abcd"
    yield b"\x80\x10\4abcd\x10\1x"
    yield b"\xff\x1f\1z"
    yield bytes([0, 0x80, 0x20]) + bytes(range(256)) * 16


def frames() -> Iterator[bytes]:
    one = crc_frame(0, b"a frame") + crc_frame(1, b"b" * 300) + crc_frame(2, b"c")
    for script in (0x00000007, 0x40000100, 0x80000003, 0xC0010001):
        yield struct.pack(">I", script) + one
    yield struct.pack(">I", 5) + one[:-1]
    yield struct.pack(">I", 5) + crc_frame(0, b"x") + crc_frame(0, b"x")


def part(*records: bytes) -> bytes:
    """A PART section."""
    end = struct.pack(">Q", EOS)
    section_id = struct.pack(">I", SECTION_ID)
    return b"\2" + section_id + b"".join(records) + end + b"\x7e" + section_id


def listen() -> Iterator[bytes]:
    small = part(
        record(0, ZERO, b"a", b"\0"),
        record(PAGE, DATA, None, page(1)),
        *(record(n * PAGE, ZERO, b"bb" if n == 4 else None, b"\0") for n in range(4, 8)),
    )
    ping = b"\x08\0\2\0\4\1\1\1\1"
    for mode in (0, 1, 4, 5):
        yield bytes([mode]) + small + ping + b"\0"
        yield bytes([mode]) + part(record(3 * PAGE, DATA, b"a", page(7))) + b"\0"
    huge = [record(n * PAGE, DATA, b"bb" if n == 0 else None, page(n)) for n in range(4)]
    yield b"\4" + part(*huge) + b"\0"
    before = record(0, DATA, b"a", page(9)) + record(0, XBZRLE, None, b"\1\0\3\5\1x")
    yield b"\2" + before + struct.pack(">Q", EOS)
    yield b"\x0c" + record(0, DATA, b"a", page(3)) + struct.pack(">Q", EOS)
    yield b"\x0d" + record(0, ZERO, b"a", b"\0") + record(PAGE, ZERO, None, b"\0")


def multifd() -> Iterator[bytes]:
    pages = packet([0, PAGE, 5 * PAGE], [7 * PAGE], idstr=b"a")
    others = packet([8 * PAGE], [9 * PAGE, 0], idstr=b"bb", number=1)
    for mode in (b"\0", b"\1"):
        yield mode + sync() + pages + others + sync()
        yield mode + packet(size=PAGE, idstr=b"stale") + sync(slots=128)
        yield mode + packet([0], idstr=b"a", flags=1) + packet([], [0], idstr=b"a")
    yield b"\0" + packet([16 * PAGE], idstr=b"a")
    yield b"\0" + packet([1], idstr=b"a")
    yield b"\0" + packet([0], idstr=b"c")
    yield b"\0" + packet([0], idstr=b"a", counts=(100, 29))
    yield b"\0" + packet([0], idstr=b"a")[:-1]


def messages(*all_: object) -> bytes:
    """Return-path messages."""
    writer = BytesWriter()
    for message in all_:
        write_rp(writer, message)  # type: ignore[arg-type]
    return writer.getvalue()


def return_path() -> Iterator[bytes]:
    asked = messages(
        RequestPages(0, PAGE, "a"), RequestPages(PAGE, PAGE, None), RequestPages(0, 8 * PAGE, "bb")
    )
    shut = messages(Shut(0))
    for mode in (0, 1, 2, 4):
        yield bytes([mode]) + messages(Pong(3)) + asked + shut
    yield b"\x08" + messages(Pong(0x01010101)) + crc_frame(0, asked + shut)
    yield b"\0" + messages(ResumeAck())


def saved(vmsd: VMStateDescription, obj: object) -> bytes:
    """A device's payload."""
    writer = BytesWriter()
    vmsd.save(writer, obj)
    return writer.getvalue()


def commands() -> bytes:
    writer = BytesWriter()
    every: tuple[Command, ...] = (
        OpenReturnPath(),
        Ping(HELLO),
        PostcopyAdvise(0x201000, PAGE),
        RamDiscard("pc.ram", (DiscardRange(0, PAGE), DiscardRange(4 * PAGE, 8 * PAGE))),
        RecvBitmap("pc.ram"),
        Packaged(9),
        PostcopyListen(),
        PostcopyRun(),
    )
    for each in every:
        write_command(writer, each)
    return writer.getvalue()[1:]


def sections() -> bytes:
    writer = BytesWriter()
    write_section_header(writer, SectionHeader(SectionType.FULL, 3, "cpu", 0, 12))
    write_footer(writer, 3)
    return writer.getvalue()


def start() -> bytes:
    writer = BytesWriter()
    write_file_header(writer)
    write_configuration(writer, Configuration("pc-i440fx-7.2", capabilities=("x-ignore-shared",)))
    return writer.getvalue()


def ram_setup(page_size: int | None) -> bytes:
    writer = BytesWriter()
    blocks = (RamSetupBlock("pc.ram", 8 << 20, page_size), RamSetupBlock("vga", 64 << 10, None))
    write_ram_setup(writer, RamSetup(blocks))
    return writer.getvalue()


def description() -> bytes:
    writer = BytesWriter()
    text = (
        b'{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer",'
    )
    write_vmdescription(writer, text + b'"version": 2, "fields": [{"name": "x", "size": 4}]}]}')
    return writer.getvalue()[1:]


def bitmap() -> bytes:
    writer = BytesWriter()
    write_received_bitmap(writer, b"\x0f\xff", 16)
    return b"\2" + writer.getvalue()


def whole_stream() -> bytes:
    writer = BytesWriter()
    write_configuration(writer, Configuration("none"))
    write_section_header(writer, SectionHeader(SectionType.START, 2, "ram", 0, 4))
    write_ram_setup(writer, RamSetup((RamSetupBlock("ram", 1 << 20, None),)))
    write_footer(writer, 2)
    end = struct.pack(">Q", EOS)
    writer.write(b"\3\0\0\0\2" + record(0, ZERO, b"ram", b"\0") + end)
    write_footer(writer, 2)
    write_end_of_stream(writer)
    return writer.getvalue()


def described(vmsd: VMStateDescription, obj: object) -> bytes:
    """A trailer with one device, a line end, the device."""
    writer, text = BytesWriter(), JsonText()
    text.start_object()
    text.string("name", vmsd.name)
    text.integer("instance_id", 0)
    vmsd.save(writer, obj, description=text)
    text.end_object()
    return b'{"devices": [' + text.text().encode() + b"]}\n" + writer.getvalue()


def loaders() -> Iterator[bytes]:
    reply = RecvBitmapReply("pc.ram")
    asked = RequestPages(0, PAGE, "a")
    payloads = (
        start(),
        sections(),
        commands(),
        messages(Shut(1), Pong(7), asked, reply, ResumeAck()),
        struct.pack(">III", HELLO, 1, HELLO + 2),
        description(),
        ram_setup(None),
        ram_setup(2 << 20),
        bitmap(),
        bytes([IDE_DRIVE.version_id]) + saved(IDE_DRIVE, IdeDrive())[:600],
        bytes([PCKBD.version_id]) + saved(PCKBD, IsaKeyboard()),
        bytes([GLOBALSTATE.version_id]) + saved(GLOBALSTATE, GlobalState()),
    )
    for number, payload in enumerate(payloads):
        yield bytes([number]) + payload
    yield b"\x80" + whole_stream()
    yield b"\xc0" + described(PCKBD, IsaKeyboard())
    yield b"\xc0" + described(IDE_DRIVE, IdeDrive())


SEEDS = {
    "ramrec": ramrec,
    "xbzrle": xbzrle,
    "frames": frames,
    "listen": listen,
    "multifd": multifd,
    "return_path": return_path,
    "loaders": loaders,
}


def main() -> None:
    """Write them all."""
    for name, seeds in SEEDS.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(seeds()):
            (folder / f"seed-{number:02}").write_bytes(data)


if __name__ == "__main__":
    main()
