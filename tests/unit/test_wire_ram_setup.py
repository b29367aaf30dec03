"""The block list: optional words recognised without knowing the blocks, lengths that must add
up.
"""

from __future__ import annotations

import pytest

from migration.wire.errors import LocalStreamError, RemoteStreamError
from migration.wire.io import BytesReader, BytesWriter
from migration.wire.ram_setup import (
    MappedRamHeader,
    RamSetup,
    RamSetupBlock,
    plan_mapped_ram,
    read_ram_setup,
    write_ram_setup,
)

PAGE = 4 << 10
HUGE = 2 << 20
GIB = 1 << 30


def encoded(setup: RamSetup) -> bytes:
    """Its bytes."""
    writer = BytesWriter()
    write_ram_setup(writer, setup)
    return writer.getvalue()


def test_bytes_of_the_plain_list() -> None:
    """As in the recording of a 1 MiB ``-M none`` guest."""
    setup = RamSetup((RamSetupBlock("ram", 1 << 20),))
    data = bytes.fromhex("0000000000100004 03 72616d 0000000000100000 0000000000000010")
    assert encoded(setup) == data
    assert read_ram_setup(BytesReader(data)) == setup


@pytest.mark.parametrize(
    ("setup", "summary", "has_addresses"),
    [
        (RamSetup((RamSetupBlock("ram", 8 << 20, HUGE),)), HUGE, False),
        (RamSetup((RamSetupBlock("a", GIB, GIB), RamSetupBlock("b", PAGE))), GIB | PAGE, False),
        (RamSetup((RamSetupBlock("a", PAGE), RamSetupBlock("b", HUGE, HUGE))), HUGE | PAGE, False),
        (RamSetup((RamSetupBlock("a", PAGE, gpa=0), RamSetupBlock("b", PAGE, gpa=HUGE))), 0, True),
        # guest address 2 MiB looks like a page size of 2 MiB
        (RamSetup((RamSetupBlock("a", PAGE, gpa=HUGE),)), HUGE, True),
        (RamSetup((RamSetupBlock("a", PAGE, gpa=HUGE),), multifd_flush=True), HUGE, True),
        (RamSetup((RamSetupBlock("a", HUGE, HUGE, gpa=HUGE),)), HUGE, True),
        (RamSetup((RamSetupBlock("a", HUGE, HUGE, gpa=0),)), HUGE, True),
        (
            RamSetup((RamSetupBlock("a", PAGE, gpa=HUGE), RamSetupBlock("b", PAGE, gpa=0))),
            HUGE,
            True,
        ),
        (RamSetup((RamSetupBlock("ram", PAGE),), multifd_flush=True), 0, False),
        (RamSetup(()), 0, False),
    ],
)
def test_optional_words_are_recognised(setup: RamSetup, summary: int, has_addresses: bool) -> None:
    """Nothing but the ADVISE and the capabilities is needed to tell them apart."""
    reader = BytesReader(encoded(setup))
    found = read_ram_setup(reader, page_sizes_summary=summary, has_addresses=has_addresses)
    assert found == setup
    assert reader.remaining == 0


def test_without_advise_no_page_size_is_read() -> None:
    """So an entry with one does not fit."""
    with pytest.raises(RemoteStreamError):
        read_ram_setup(BytesReader(encoded(RamSetup((RamSetupBlock("ram", 8 << 20, HUGE),)))))


def test_mapped_ram_jumps_past_each_page_area() -> None:
    """Writer and reader are handed the block behind its header and move on themselves."""
    base = 64
    writer = BytesWriter(base=base)
    block = plan_mapped_ram(RamSetupBlock("ram", 2 << 20), file_offset=base + 8, page_size=PAGE)
    header = block.mapped_ram
    assert header == MappedRamHeader(PAGE, base + 8 + 4 + 8 + 28, 1 << 20)
    end = header.pages_offset + block.used_length

    def pad(entry: RamSetupBlock) -> None:
        assert entry == block
        writer.write(bytes(end - writer.position))

    setup = RamSetup((block,))
    write_ram_setup(writer, setup, skip_pages=pad)
    reader = BytesReader(writer.getvalue(), base=base)

    def skip(entry: RamSetupBlock) -> None:
        assert entry.mapped_ram is not None
        assert reader.position == entry.mapped_ram.bitmap_offset
        reader.read(end - reader.position)

    assert read_ram_setup(reader, has_mapped_ram=True, skip_pages=skip) == setup
    assert reader.remaining == 0


def test_mapped_ram_needs_someone_to_jump() -> None:
    """A pipe cannot carry it."""
    block = plan_mapped_ram(RamSetupBlock("ram", PAGE), file_offset=0, page_size=PAGE)
    with pytest.raises(LocalStreamError, match="seekable"):
        encoded(RamSetup((block,)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("0000000000100008", "where the block list should be"),
        ("0000000000100004 00", "empty block name"),
        ("0000000000100004 01 61 0000000000200000", "passes the total"),
        ("0000000000100004 01 61 ff00000000000000", "block 'a' of 0xff"),
        ("0000000000002004 01 61 0000000000001000 01 61", "wanted 8 bytes"),
        ("0000000000002004 01 61 0000000000001000 01 61 0000000000001000", "listed twice"),
        ("0000000000001004 01 61 0000000000001000 0000000000000008", "should end"),
        ("0000000000001004 01 61 0000000000001000 0000000000000200 0000000000000200", "should end"),
    ],
)
def test_lists_that_cannot_be_are_refused(data: str, reason: str) -> None:
    """Section and offset are named."""
    with pytest.raises(RemoteStreamError, match=reason) as caught:
        read_ram_setup(BytesReader(bytes.fromhex(data), section="ram"))
    assert caught.value.section == "ram"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("00000002" + "00" * 24, "version 2"),
        ("00000001" + "00" * 24, "page size 0x0"),
        ("00000001 0000000000001001" + "00" * 16, "page size 0x1001"),
        ("00000001 0000000000001000 0000000000000100 0000000000000100", "bitmap at 0x100"),
        ("00000001 0000000000001000 0000000000000100 ff00000000000000", "pages at 0xff"),
    ],
)
def test_mapped_ram_headers_that_cannot_be_are_refused(header: str, reason: str) -> None:
    """A pages area that overlaps the bitmap, or lies nowhere."""
    data = "0000000000001004 01 61 0000000000001000" + header
    with pytest.raises(RemoteStreamError, match=reason):
        read_ram_setup(BytesReader(bytes.fromhex(data)), has_mapped_ram=True)


def test_blocks_past_the_bounds_are_not_written() -> None:
    """Odd totals would collide with the flag bits, huge ones with the next name's length."""
    for block in (RamSetupBlock("a", 1), RamSetupBlock("a", 1 << 56), RamSetupBlock("", PAGE)):
        with pytest.raises(LocalStreamError):
            encoded(RamSetup((block,)))
