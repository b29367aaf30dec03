"""Scanner and tampers on a small hand-made stream: no byte lost, each mishap in its place."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.stream_elements import Element, Kind, Phase
from tests.support.stream_scanner import StreamScanner
from tests.support.tamper import (
    Cut,
    CutAt,
    CutAtByte,
    DropPage,
    FlipPageByte,
    ReplayStale,
    SwapPages,
    Tamper,
    command,
)

PAGE_BYTES = 4096
RAM_ID = 7
CHOSEN_WITH_CHECKSUMS = 0x50460001


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def cmd(number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BHH", 8, number, len(payload)) + payload


def record(offset: int, fill: int, block: str | None = None) -> bytes:
    """A page record; without a block it continues the one before."""
    flags = 0x08 | (0 if block else 0x20)
    return (
        struct.pack(">Q", offset | flags)
        + (name(block) if block else b"")
        + bytes([fill]) * PAGE_BYTES
    )


def ram(type_: int, *records: bytes) -> bytes:
    head = struct.pack(">BI", type_, RAM_ID)
    if type_ == 1:
        head += name("ram") + struct.pack(">II", 0, 4)
    return head + b"".join(records) + struct.pack(">Q", 0x10) + struct.pack(">BI", 0x7E, RAM_ID)


def device(section: int, payload: bytes) -> bytes:
    head = struct.pack(">BI", 4, section) + name("toy") + struct.pack(">II", 0, 1)
    return head + payload + struct.pack(">BI", 0x7E, section)


BLOCKS = struct.pack(">Q", (8 << 20) | 4) + name("a") + struct.pack(">Q", 4 << 20)
BLOCKS += name("b") + struct.pack(">QQ", 4 << 20, 2 << 20)  # the second one on 2 MiB pages
PACKAGE = (
    cmd(4)
    + device(9, b"\x7e\x00\x00\x00\x09\xff state")
    + device(0, b"\x7e" + bytes(16))  # as a clock may look that is zero but for one byte
    + cmd(2, struct.pack(">I", 3))
    + cmd(5)
)
PLAIN = (
    b"QEVM\x00\x00\x00\x03"
    + b"\x07\x00\x00\x00\x03toy"
    + cmd(3, struct.pack(">QQ", 0x201000, 4096))
)
REST = (
    ram(1, BLOCKS)
    + ram(2, record(0x1000, 1, "a"), record(0x2000, 2), struct.pack(">Q", 0x3022) + b"\0")
    + cmd(6, b"\0\1a\0" + struct.pack(">QQ", 0, 4096))
    + cmd(7, struct.pack(">I", len(PACKAGE)))
    + PACKAGE
    + ram(2, record(0x1000, 0x11, "a"), record(0x5000, 5), record(0x6000, 6, "b"))
    + ram(3, record(0x7000, 7), struct.pack(">Q", 0x8022) + b"\0")
    + b"\0"
)
STREAM = PLAIN + REST


def framed(data: bytes, sizes: list[int]) -> bytes:
    """``data`` cut into frames of these sizes, over and over; the checksum is a stand-in."""
    out, at, index = b"", 0, 0
    while at < len(data):
        piece = data[at : at + sizes[index % len(sizes)]]
        out += struct.pack(">II", len(piece), 0xC0FFEE00 + index % 256) + piece
        at, index = at + len(piece), index + 1
    return out


def scan(stream: bytes, chunk_bytes: int = 1 << 20) -> list[Element]:
    scanner = StreamScanner()
    elements = []
    for at in range(0, len(stream), chunk_bytes):
        elements += scanner.feed(stream[at : at + chunk_bytes])
    elements += scanner.close()
    assert not scanner.lost
    assert not scanner.truncated
    return elements


def pages(elements: list[Element]) -> list[tuple[Phase, str, int, int]]:
    return [(e.phase, e.block, e.page_offset, e.page[0]) for e in elements if e.kind is Kind.PAGE]


EXPECTED_PAGES = [
    (Phase.PRECOPY, "a", 0x1000, 1),
    (Phase.PRECOPY, "a", 0x2000, 2),
    (Phase.POSTCOPY, "a", 0x1000, 0x11),
    (Phase.POSTCOPY, "a", 0x5000, 5),
    (Phase.POSTCOPY, "b", 0x6000, 6),
    (Phase.POSTCOPY, "b", 0x7000, 7),
]


@given(st.integers(min_value=1, max_value=5000))
def test_every_split_gives_the_same_bytes_and_pages(chunk_bytes: int) -> None:
    elements = scan(STREAM, chunk_bytes)
    assert b"".join(e.wire() for e in elements) == STREAM
    assert pages(elements) == EXPECTED_PAGES
    names = [e.name for e in elements if e.kind is Kind.COMMAND]
    assert names == ["ADVISE", "DISCARD", "PACKAGED", "LISTEN", "PING", "RUN"]


@given(st.lists(st.integers(min_value=1, max_value=9000), min_size=1), st.integers(1, 9000))
def test_frames_are_taken_apart_and_put_back(sizes: list[int], chunk_bytes: int) -> None:
    """Pages are found wherever frame borders fall, and the wire stays as it was."""
    switch = cmd(2, struct.pack(">I", CHOSEN_WITH_CHECKSUMS))
    stream = PLAIN + switch + framed(REST, sizes)
    elements = scan(stream, chunk_bytes)
    assert b"".join(e.wire() for e in elements) == stream
    assert pages(elements) == EXPECTED_PAGES


@given(st.integers(min_value=0, max_value=len(STREAM) - 1))
def test_a_truncated_stream_is_passed_on_whole(length: int) -> None:
    scanner = StreamScanner()
    elements = scanner.feed(STREAM[:length]) + scanner.close()
    assert b"".join(e.wire() for e in elements) == STREAM[:length]
    assert not scanner.lost


def test_an_unknown_stream_is_passed_on_and_named() -> None:
    scanner = StreamScanner()
    broken = PLAIN + b"\x55 whatever"
    elements = scanner.feed(broken) + scanner.feed(b"more") + scanner.close()
    assert b"".join(e.wire() for e in elements) == broken + b"more"
    assert scanner.lost == f"no section starts with 0x55 at stream offset {len(PLAIN)}"


def run(*tampers: Tamper) -> bytes:
    out = b""
    for element in scan(STREAM):
        elements = [element]
        for tamper in tampers:
            elements = [new for old in elements for new in tamper.see(old)]
        out += b"".join(e.wire() for e in elements)
    for tamper in tampers:
        out += b"".join(e.wire() for e in tamper.finish())
    return out


def test_flip_page_byte() -> None:
    flip = FlipPageByte(1, at=10, mask=0xF0)
    damaged = run(flip)
    differing = [at for at in range(len(STREAM)) if STREAM[at] != damaged[at]]
    assert len(differing) == 1
    assert damaged[differing[0]] == 5 ^ 0xF0
    assert flip.hits == 1


def test_swap_pages() -> None:
    swap = SwapPages(0)
    assert [p[3] for p in pages(scan(run(swap)))] == [1, 2, 5, 0x11, 6, 7]


def test_swap_without_a_second_page_damages_nothing() -> None:
    swap = SwapPages(3)
    assert run(swap) == STREAM
    assert swap.hits == 0


def test_replay_stale() -> None:
    """The page at 0x1000 arrives with its precopy contents; others, never sent before, stay."""
    stale = ReplayStale()
    assert [p[3] for p in pages(scan(run(stale)))] == [1, 2, 1, 5, 6, 7]


@pytest.mark.parametrize("nth", range(4))
def test_drop_page_keeps_every_other_page_in_its_block(nth: int) -> None:
    """Dropping a record that names the block makes the next one name it."""
    drop = DropPage(nth)
    expected = EXPECTED_PAGES[:2] + [p for i, p in enumerate(EXPECTED_PAGES[2:]) if i != nth]
    elements = scan(run(drop))
    assert pages(elements) == expected
    assert [e.block for e in elements if e.kind is Kind.ZERO] == ["a", "b"]


def test_drop_a_whole_host_page() -> None:
    """On 2 MiB pages all records of the host page go; the first one due is at its start."""
    drop = DropPage(0, phase=Phase.PRECOPY, host_page_bytes=0x1000 * 2)
    assert pages(scan(run(drop)))[:1] == EXPECTED_PAGES[:1]
    assert not [e for e in scan(run(drop)) if e.page_offset == 0x3000]


@pytest.mark.parametrize("after", [0, 1, 9])
def test_cut_inside_packaged(after: int) -> None:
    cut = CutAt(command("PACKAGED"), after=after)
    with pytest.raises(Cut) as caught:
        run(cut)
    packaged = cmd(7, struct.pack(">I", len(PACKAGE)))
    assert caught.value.first == packaged[:after]
    assert caught.value.rest == packaged[after:]


def bytes_before_the_cut(cut: CutAtByte) -> int:
    sent = 0
    for element in scan(STREAM):
        try:
            sent += sum(len(e.wire()) for e in cut.see(element))
        except Cut as interruption:
            return sent + len(interruption.first)
    return -1


@given(st.integers(min_value=1, max_value=len(STREAM)))
def test_cut_at_a_byte(offset: int) -> None:
    assert bytes_before_the_cut(CutAtByte(offset)) == offset
