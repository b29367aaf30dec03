"""Headers, commands, messages and block lists: what is written is read back; damage is a typed
error.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

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
    read_command,
    split_discards,
    write_command,
)
from migration.wire.constants import CAPABILITIES_MAX, SectionType
from migration.wire.errors import RemoteStreamError
from migration.wire.extension import (
    HELLO,
    DestinationHandshake,
    Feature,
    SourceHandshake,
    SourcePhase,
)
from migration.wire.headers import (
    Configuration,
    SectionHeader,
    read_configuration,
    read_section_header,
    read_section_type,
    write_configuration,
    write_section_header,
)
from migration.wire.io import BytesReader, BytesWriter, Reader
from migration.wire.ram_setup import RamSetup, RamSetupBlock, read_ram_setup, write_ram_setup
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
    write_received_bitmap,
    write_rp,
)

PAGE = 4 << 10
U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
NAMES = st.text(min_size=1, max_size=255).filter(lambda text: len(text.encode()) <= 255)
RANGES = st.builds(DiscardRange, st.integers(0, 2**63), st.integers(1, 2**63))
COMMANDS: st.SearchStrategy[Command] = st.one_of(
    st.sampled_from(
        [
            OpenReturnPath(),
            PostcopyAdviseEmpty(),
            PostcopyListen(),
            PostcopyRun(),
            EnableColo(),
            PostcopyResume(),
            SwitchoverStart(),
        ]
    ),
    st.builds(Ping, U32),
    st.builds(PostcopyAdvise, U64, U64),
    st.builds(RamDiscard, NAMES, st.lists(RANGES, min_size=1, max_size=40).map(tuple)),
    st.builds(Packaged, U32),
    st.builds(RecvBitmap, NAMES),
)
OFFSETS = st.integers(0, 2**63)
LENGTHS = st.integers(1, 2**32 - 1)
MESSAGES: st.SearchStrategy[ReturnPathMessage] = st.one_of(
    st.builds(Shut, U32),
    st.builds(Pong, U32),
    st.builds(RequestPages, OFFSETS, LENGTHS, st.none() | NAMES),
    st.builds(RecvBitmapReply, NAMES),
    st.just(ResumeAck()),
    st.just(SwitchoverAck()),
)
CONFIGURATIONS = st.builds(
    Configuration,
    NAMES,
    st.none() | U32,
    st.none() | st.lists(NAMES, max_size=CAPABILITIES_MAX).map(tuple),
    st.none() | st.binary(min_size=16, max_size=16).map(lambda raw: uuid.UUID(bytes=raw)),
)
BLOCKS = st.lists(
    st.tuples(NAMES, st.integers(1, 2**30).map(lambda pages: pages * PAGE)),
    max_size=8,
    unique_by=lambda block: block[0],
)


def damage(data: bytes, draw: st.DataObject, read: Callable[[Reader], object]) -> None:
    """Cut or flipped: read as something else, or a typed error inside the data."""
    cut = data[: draw.draw(st.integers(0, len(data) - 1))]
    flipped = bytearray(data)
    flipped[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    for damaged in (cut, bytes(flipped)):
        error = refusal(damaged, read)
        assert error is None or 0 <= error.offset <= len(damaged)


def refusal(data: bytes, read: Callable[[Reader], object]) -> RemoteStreamError | None:
    """The typed error that reading raises; any other escapes."""
    try:
        read(BytesReader(data))
    except RemoteStreamError as error:
        return error
    return None


@given(COMMANDS, st.data())
def test_commands(command: Command, draw: st.DataObject) -> None:
    """Each comes back as it was."""
    writer = BytesWriter()
    write_command(writer, command)
    data = writer.getvalue()[1:]
    reader = BytesReader(data)
    assert read_command(reader) == command
    assert reader.remaining == 0
    damage(data, draw, read_command)


@given(MESSAGES, st.data())
def test_return_path_messages(message: ReturnPathMessage, draw: st.DataObject) -> None:
    """Each comes back as it was."""
    writer = BytesWriter()
    write_rp(writer, message)
    reader = BytesReader(writer.getvalue())
    assert read_rp(reader) == message
    assert reader.remaining == 0
    damage(writer.getvalue(), draw, read_rp)


@given(CONFIGURATIONS, st.data())
def test_configurations(configuration: Configuration, draw: st.DataObject) -> None:
    """With any subset of subsections; what follows is not touched."""
    writer = BytesWriter()
    write_configuration(writer, configuration)
    data = writer.getvalue()[1:]
    reader = BytesReader(data + b"\x08")
    assert read_configuration(reader) == configuration
    assert reader.remaining == 1
    damage(data, draw, read_configuration)


@given(st.sampled_from([SectionType.START, SectionType.FULL]), U32, NAMES, U32, U32, st.data())
def test_section_headers(
    kind: SectionType, section_id: int, idstr: str, instance: int, version: int, draw: st.DataObject
) -> None:
    """With any numbers and names."""
    header = SectionHeader(kind, section_id, idstr, instance, version)
    writer = BytesWriter()
    write_section_header(writer, header)
    reader = BytesReader(writer.getvalue())
    assert read_section_header(reader, read_section_type(reader), {}) == header

    def read(reader: Reader) -> object:
        return read_section_header(reader, kind, {})

    damage(writer.getvalue()[1:], draw, read)


@given(
    BLOCKS, st.lists(st.booleans(), min_size=8, max_size=8), st.booleans(), st.booleans(), st.data()
)
def test_block_lists(
    entries: list[tuple[str, int]],
    huge: list[bool],
    has_addresses: bool,
    multifd_flush: bool,
    draw: st.DataObject,
) -> None:
    """Mixed page sizes, addresses that look like page sizes: all told apart."""
    summary = PAGE | 2 << 20
    addresses = st.sampled_from([0, 2 << 20, 1 << 30, 3 << 30])
    blocks = tuple(
        RamSetupBlock(
            name,
            length,
            2 << 20 if is_huge else None,
            draw.draw(addresses) if has_addresses else None,
        )
        for (name, length), is_huge in zip(entries, huge, strict=False)
    )
    setup = RamSetup(blocks, multifd_flush)
    writer = BytesWriter()
    write_ram_setup(writer, setup)

    def read(reader: Reader) -> RamSetup:
        return read_ram_setup(reader, page_sizes_summary=summary, has_addresses=has_addresses)

    assert read(BytesReader(writer.getvalue())) == setup
    damage(writer.getvalue(), draw, read)


@given(st.integers(1, 2000), st.data())
def test_received_bitmaps(pages: int, draw: st.DataObject) -> None:
    """Padding is added on the way out and of no meaning on the way in."""
    bitmap = draw.draw(st.binary(min_size=(pages + 7) // 8, max_size=received_bitmap_bytes(pages)))
    writer = BytesWriter()
    write_received_bitmap(writer, bitmap, pages)
    found = read_received_bitmap(BytesReader(writer.getvalue()), pages)
    assert found[: len(bitmap)] == bitmap
    assert not any(found[len(bitmap) :])


@given(NAMES, st.lists(RANGES, max_size=60))
def test_discards_keep_every_range_in_order(idstr: str, ranges: list[DiscardRange]) -> None:
    """However they are split, each command can be written."""
    commands = list(split_discards(idstr, ranges))
    assert [each for command in commands for each in command.ranges] == ranges
    for command in commands:
        write_command(BytesWriter(), command)


@given(U16, U16, st.lists(U32, max_size=10))
def test_a_handshake_only_ever_agrees_on_what_both_have(
    offered: int, supported: int, noise: list[int]
) -> None:
    """Whatever else is pinged in between; both ends hold the same set."""
    source = SourceHandshake(Feature(offered & 7))
    destination = DestinationHandshake(Feature(supported & 7))
    for value in noise:
        if value != HELLO:
            assert len(destination.on_ping(value, offset=0)) == 1
    waiting = [ping.value for ping in source.start()]
    while waiting:
        for pong in destination.on_ping(waiting.pop(0), offset=0):
            waiting += [ping.value for ping in source.on_pong(pong.value, offset=0)]
    assert source.phase is SourcePhase.IN_FORCE
    assert source.chosen == destination.chosen == Feature(offered & supported & 7)
