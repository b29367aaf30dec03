"""RAM records, counts and pictures; XBZRLE; multifd packets; mapped-ram; content in images."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest

from migration.analyze.events import (
    ErrorEvent,
    Event,
    MultifdEvent,
    PreemptEvent,
    RamBlockEvent,
    SectionEvent,
)
from migration.analyze.image import BlockImage, compare_images
from migration.analyze.pagemap import PAGE_MAP_BYTES_MAX, BlockState, PageState
from migration.analyze.ramdraw import COLUMNS, draw, pages_per_cell
from migration.analyze.session import Session
from migration.analyze.xbzrle import XbzrleError, apply_xbzrle, iter_runs
from migration.wire.commands import DiscardRange, PostcopyAdvise, RamDiscard
from migration.wire.constants import MULTIFD_MAGIC, RamFlag
from migration.wire.headers import Configuration
from migration.wire.ram_setup import RamSetupBlock
from tests.support.analyze_streams import (
    PAGE,
    StreamBuilder,
    analyse,
    eos,
    page,
    record,
    source_of,
    zero,
)

A, B = b"a" * PAGE, b"b" * PAGE


def ram(*records: bytes, pages: int = 8) -> bytes:
    """A stream with one block ``ram`` and these records."""
    stream = StreamBuilder().ram_start(RamSetupBlock("ram", pages * PAGE))
    return stream.ram_part(*records).ram_end().end().data


def block_of(events: list[Event], idstr: str = "ram") -> BlockState:
    """The state of that block at the end."""
    return next(
        event.block
        for event in events
        if isinstance(event, RamBlockEvent) and event.block.idstr == idstr
    )


def collect(tmp_path: Path, data: bytes, *others: bytes) -> bytes:
    """Content of the block ``ram``."""
    path = tmp_path / "image"

    def image_for(block: BlockState) -> BlockImage:
        return BlockImage(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))

    session = Session([source_of(each) for each in (data, *others)], image_for=image_for)
    events = list(session.events())
    assert not isinstance(events[-1], ErrorEvent), events[-1]
    image = session.state.ram.images["ram"]
    image.set_length(block_of(events).used_length)
    image.close()
    return path.read_bytes()


def test_counts_and_states() -> None:
    """Data, zero, sent again, discarded, never sent."""
    stream = StreamBuilder().command(PostcopyAdvise(PAGE, PAGE))
    stream.ram_start(RamSetupBlock("ram", 8 * PAGE))
    stream.ram_part(page(0, A, "ram"), zero(PAGE), page(2 * PAGE, A), page(2 * PAGE, B), zero(0))
    discards = (DiscardRange(PAGE, 2 * PAGE), DiscardRange(6 * PAGE, PAGE))
    stream.command(RamDiscard("ram", discards)).ram_end(page(PAGE, B)).end(None)
    block = block_of(analyse(stream.data))
    assert block.states is not None
    resent = PageState.RESENT
    assert list(block.states) == [
        PageState.ZERO | resent,
        PageState.DATA | resent,
        PageState.DATA | resent | PageState.DISCARDED,
        *[PageState.ABSENT] * 5,
    ]
    counts = block.counts
    assert (counts.normal, counts.zero, counts.resent, counts.discarded) == (4, 2, 3, 3)
    assert [row for _, row in draw(block)] == ["222....."]
    runs = [(first, count) for first, count, _ in block.runs()]
    assert runs == [(0, 1), (1, 1), (2, 1), (3, 5)]


def test_sections_count_their_own_records() -> None:
    """As the JSON line of a PART has them."""
    events = analyse(ram(page(0, A, "ram"), zero(PAGE)))
    part = [event for event in events if isinstance(event, SectionEvent)][1]
    assert part.live == {"normal": 1, "zero": 1}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (zero(0), "none was named before"),
        (zero(0, "rom"), "unknown block 'rom'"),
        (zero(8 * PAGE, "ram"), "page 0x8000 of block 'ram'"),
        (record(RamFlag.ZERO, 0, b"\x5a", "ram"), "fill byte 0x5a"),
        (record(RamFlag.PAGE | RamFlag.ZERO, 0, A, "ram"), "is none: flags 0x00a"),
        (record(RamFlag.FULL, 0, b"", "ram"), "is none: flags 0x001"),
        (record(0x800, 0, b"", "ram"), "is none: flags 0x800"),
        (record(RamFlag.HOOK, 0, b"", "ram"), "RDMA hook"),
        ((PAGE | RamFlag.MEM_SIZE).to_bytes(8, "big"), "block list outside"),
        ((PAGE | RamFlag.EOS).to_bytes(8, "big"), "is none"),
        (int(RamFlag.PAGE).to_bytes(8, "big") + b"\0", "empty block name"),
        (record(RamFlag.XBZRLE, 0, b"\x02\0\x03\0\x01\x06", "ram"), "encoding 0x02"),
        (record(RamFlag.XBZRLE, 0, b"\x01\x10\x01" + bytes(4097), "ram"), "delta of 4097"),
        (record(RamFlag.XBZRLE, 0, b"\x01\0\x02\0\0", "ram"), "a run of no bytes"),
        (record(RamFlag.COMPRESS_PAGE, 0, b"\0\0\0\0", "ram"), "compressed page of 0 bytes"),
        (record(RamFlag.COMPRESS_PAGE, 0, b"\0\0\0\x04abcd", "ram"), "is damaged"),
        (
            record(RamFlag.COMPRESS_PAGE, 0, b"\0\0\0\x09" + zlib.compress(b"a"), "ram"),
            "compressed page of 1 bytes",
        ),
    ],
)
def test_wrong_records(bad: bytes, reason: str) -> None:
    """Section and offset of the record; what came before is counted."""
    data = ram(bad)
    error = analyse(data)[-1]
    assert isinstance(error, ErrorEvent)
    assert error.section == "ram"
    assert reason in error.message
    assert 0 <= error.offset - data.index(bad) <= 20


def test_a_compression_bomb_is_not_unfolded() -> None:
    """A page's worth of input that wants to be a hundred pages."""
    packed = zlib.compress(bytes(100 * PAGE))
    data = ram(record(RamFlag.COMPRESS_PAGE, 0, len(packed).to_bytes(4, "big") + packed, "ram"))
    error = analyse(data)[-1]
    assert isinstance(error, ErrorEvent)
    assert "compressed page of 4097 bytes" in error.message


def test_content_follows_every_kind_of_record(tmp_path: Path) -> None:
    """The last word on each page: data, zero after data, a delta, a compressed page."""
    packed = zlib.compress(B)
    data = ram(
        page(0, A, "ram"),
        page(PAGE, A),
        zero(PAGE),
        page(2 * PAGE, A),
        record(RamFlag.XBZRLE, 2 * PAGE, b"\x01\0\x05\x02\x03xyz"),
        record(RamFlag.COMPRESS_PAGE, 3 * PAGE, len(packed).to_bytes(4, "big") + packed),
        pages=5,
    )
    changed = b"aa" + b"xyz" + A[5:]
    assert collect(tmp_path, data) == A + bytes(PAGE) + changed + B + bytes(PAGE)


@pytest.mark.parametrize(
    ("delta", "runs"),
    [
        ("0001 06", [(0, b"\x06")]),
        ("03 02 6162 01 01 63", [(3, b"ab"), (6, b"c")]),
        ("8001 01 ff", [(128, b"\xff")]),
        ("ff1f 01 ff", [(4095, b"\xff")]),
        ("", []),
    ],
)
def test_xbzrle_runs(delta: str, runs: list[tuple[int, bytes]]) -> None:
    """Counts of one and two bytes; what follows the last run is unchanged."""
    assert list(iter_runs(bytes.fromhex(delta), PAGE)) == runs
    expected = bytearray(A)
    for offset, data in runs:
        expected[offset : offset + len(data)] = data
    assert apply_xbzrle(bytes.fromhex(delta), A) == bytes(expected)


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        ("00", "ends inside a pair"),
        ("80", "ends inside a count"),
        ("808001 01 ff", "more than two bytes"),
        ("01 00", "a run of no bytes"),
        ("01 01 aa 00 01 bb", "no unchanged bytes between"),
        ("01 02 aa", "ends inside a run"),
        ("8020 01 aa", "passes the page by 1 bytes"),
    ],
)
def test_wrong_xbzrle(delta: str, reason: str) -> None:
    """Each rule of the format."""
    with pytest.raises(XbzrleError, match=reason):
        list(iter_runs(bytes.fromhex(delta), PAGE))


def test_preempt_channel_counts_and_continues_on_its_own() -> None:
    """It may end anywhere between records, or with an EOS, but not go on after one."""
    main = ram(page(0, A, "ram"))
    records = page(PAGE, A, "ram") + zero(2 * PAGE)
    for channel in (records, records + eos()):
        events = analyse(main, channel)
        preempt = next(event for event in events if isinstance(event, PreemptEvent))
        assert preempt.values == {"normal": 1, "zero": 1}
        assert block_of(events).counts.normal == 2
    error = analyse(main, records + eos() + b"\0")[-1]
    assert isinstance(error, ErrorEvent)
    assert "after the channel's end mark" in error.message
    error = analyse(main, records[:-5])[-1]
    assert isinstance(error, ErrorEvent)
    assert error.section == "preempt channel"


def packet(
    offsets: list[int], zeros: list[int], data: bytes, *, flags: int = 0, size: int | None = None
) -> bytes:
    """A multifd packet with its data."""
    head = struct.pack(
        ">IIIIIIQI28x256s",
        MULTIFD_MAGIC,
        1,
        flags,
        128,
        len(offsets),
        len(data) if size is None else size,
        1,
        len(zeros),
        b"ram",
    )
    slots = [*offsets, *zeros]
    slots += [0] * (128 - len(slots))
    return head + struct.pack(">128Q", *slots) + data


def greeting(channel: int = 0) -> bytes:
    """The first 64 bytes of a multifd channel."""
    return struct.pack(">II16sB39x", MULTIFD_MAGIC, 1, bytes(16), channel)


def multifd_main() -> bytes:
    """A main channel with the new flush rule: one sync in START, one flush."""
    stream = StreamBuilder().ram_start(RamSetupBlock("ram", 8 * PAGE), multifd_flush=True)
    flush = int(RamFlag.MULTIFD_FLUSH).to_bytes(8, "big")
    return stream.ram_part(flush).ram_part(zero(PAGE, "ram")).ram_end().end().data


def test_multifd_pages_come_in_the_order_of_the_syncs(tmp_path: Path) -> None:
    """The main channel's later zero wins over the page in front of the SYNC it waited for."""
    sync = packet([], [], b"", flags=1, size=12345)  # stale size, as QEMU 7.2 leaves it
    first = packet([0, PAGE], [2 * PAGE], A + A) + sync
    channel = greeting() + sync + first + packet([0], [], B)
    assert collect(tmp_path, multifd_main(), channel)[: 3 * PAGE] == B + bytes(2 * PAGE)
    events = analyse(multifd_main(), channel)
    multifd = next(event for event in events if isinstance(event, MultifdEvent))
    assert multifd.values["packets"] == 4
    assert multifd.values["syncs"] == 2
    assert multifd.values["pages"] == {"normal": 3, "zero": 1}


def test_multifd_zlib_is_one_stream_over_all_packets(tmp_path: Path) -> None:
    """Each packet is a flushed piece of it."""
    pack = zlib.compressobj()
    pieces = [pack.compress(each) + pack.flush(zlib.Z_SYNC_FLUSH) for each in (A + B, B)]
    sync = packet([], [], b"", flags=1)
    channel = greeting() + sync + sync
    channel += packet([0, PAGE], [], pieces[0], flags=2) + packet(
        [2 * PAGE], [], pieces[1], flags=2
    )
    assert collect(tmp_path, multifd_main(), channel)[: 3 * PAGE] == A + B + B


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"\x11\x22\x33\x45" + bytes(1340), "no multifd packet"),
        (packet([8 * PAGE], [], A), "page 0x8000 of block 'ram'"),
        (packet([1], [], A), "page 0x1 of block 'ram'"),
        (packet([0], [], A[:-1]), "4095 bytes of data for 4096"),
        (packet([0], [], A, flags=0x100), "packet flags 0x100"),
        (packet([0], [], A, flags=6), "packet flags 0x6"),
        (packet([0], [], b"abc", flags=2), "zlib data is damaged"),
        (packet([0], [], zlib.compress(A + A), flags=2), "does not make 4096 bytes"),
        (packet([0], [], b"x" * 100_000, flags=2), "100000 bytes of compressed data"),
        (packet([0], [], A).replace(b"ram\0", b"rom\0", 1), "unknown block 'rom'"),
        (packet([0], [], A)[:-1], "the file ends"),
    ],
)
def test_wrong_multifd_packets(bad: bytes, reason: str) -> None:
    """Named by channel and file."""
    error = analyse(multifd_main(), greeting(3) + bad)[-1]
    assert isinstance(error, ErrorEvent)
    assert error.section == "multifd channel 3"
    assert reason in error.message
    assert "channel 1" in error.message


def mapped(pages: dict[int, bytes], count: int = 5) -> bytes:
    """A mapped-ram file with these pages of a block of ``count`` pages."""
    stream = StreamBuilder().configuration(Configuration("none", capabilities=("mapped-ram",)))
    at = len(stream.data)
    head = (count * PAGE | RamFlag.MEM_SIZE).to_bytes(8, "big")
    entry = b"\x03ram" + (count * PAGE).to_bytes(8, "big")
    section = bytes.fromhex("01 00000002 03 72616d 00000000 00000004")
    bitmap_at = at + len(section) + len(head) + len(entry) + 28
    header = struct.pack(">IQQQ", 1, PAGE, bitmap_at, 1 << 20)
    bitmap = sum(1 << index for index in pages).to_bytes(8, "little")
    body = b"".join(pages.get(index, bytes(PAGE)) for index in range(count))
    gap = bytes((1 << 20) - bitmap_at - 8)
    stream.raw(section + head + entry + header + bitmap + gap + body + eos() + b"\x7e\0\0\0\2")
    return stream.ram_part().ram_end().end().data


def test_mapped_ram(tmp_path: Path) -> None:
    """Pages are where the header says; a clear bit is a zero page whatever lies there."""
    data = mapped({0: A, 3: B})
    assert collect(tmp_path, data) == A + bytes(2 * PAGE) + B + bytes(PAGE)
    counts = block_of(analyse(data)).counts
    assert (counts.normal, counts.zero, counts.resent) == (2, 3, 0)
    stale = data[: (1 << 20) + PAGE] + B + data[(1 << 20) + 2 * PAGE :]
    assert collect(tmp_path, stale)[PAGE : 2 * PAGE] == bytes(PAGE)


def test_mapped_ram_inside_a_larger_file(tmp_path: Path) -> None:
    """``file:PATH,offset=N``: what is in front of the stream is passed over."""
    data = bytes(1000) + mapped({1: A})
    assert collect(tmp_path, data)[PAGE : 2 * PAGE] == A


def test_absurd_blocks_are_counted_but_not_mapped() -> None:
    """A claim of 2**55 bytes costs nothing."""
    stream = StreamBuilder().ram_start(RamSetupBlock("ram", 1 << 55))
    stream.ram_end(zero((1 << 55) - PAGE, "ram"), zero(0)).end()
    block = block_of(analyse(stream.data))
    assert block.page_count > PAGE_MAP_BYTES_MAX
    assert block.states is None
    assert block.counts.zero == 2
    assert list(draw(block)) == []


def test_pictures_stay_small() -> None:
    """At most 16 rows, whatever the size; cells show what is most worth knowing."""
    block = BlockState("ram", 1 << 30, PAGE, PAGE, states=bytearray((1 << 30) // PAGE))
    block.sent(0, PageState.DATA)
    block.sent(5000, PageState.ZERO)
    rows = list(draw(block))
    assert len(rows) == 16
    assert {len(row) for _, row in rows} == {COLUMNS}
    assert rows[0][1][0] == "#"
    assert rows[0][1][5000 // pages_per_cell(block)] == "0"
    assert rows[1][0] == COLUMNS * pages_per_cell(block) * PAGE


def test_repeated_discards_do_not_buy_minutes() -> None:
    """Past a few times the block, they are counted and no longer marked."""
    block = BlockState("ram", 100 * PAGE, PAGE, PAGE, states=bytearray(100))
    for _ in range(10):
        block.discard(0, 100)
    block.sent(0, PageState.DATA)
    block.discard(0, 100)
    assert block.counts.discarded == 1100
    assert block.states is not None
    assert block.states[0] == PageState.DATA


def test_images_are_compared_by_page(tmp_path: Path) -> None:
    """Neighbouring pages make one range; holes on both sides are not read."""
    images = []
    for name in ("one", "other"):
        image = BlockImage(os.open(tmp_path / name, os.O_RDWR | os.O_CREAT, 0o600))
        image.put(0, A)
        image.put(1 << 40, A)
        images.append(image)
    with images[0] as one, images[1] as other:
        length = (1 << 40) + 4 * PAGE
        assert list(compare_images(one, other, length, PAGE)) == []
        other.put(PAGE, B + B)
        other.put((1 << 40) + PAGE, B)
        assert list(compare_images(one, other, length, PAGE)) == [
            (PAGE, 2 * PAGE),
            ((1 << 40) + PAGE, PAGE),
        ]
