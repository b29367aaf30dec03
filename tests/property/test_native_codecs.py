"""The C codecs through Python: RAM records, XBZRLE, CRC-32C."""

from __future__ import annotations

import errno
import struct

from hypothesis import example, given
from hypothesis import strategies as st

from migration.native import crc32c, ffi, lib

PAGE = 4096
PAGE_FLAG, ZERO, EOS, CONTINUE, XBZRLE, COMPRESS = 0x08, 0x02, 0x10, 0x20, 0x40, 0x100
HEAD_MAX = 8 + 1 + 255 + 4
OFFSETS = st.integers(0, (1 << 52) - 1).map(lambda page: page * PAGE)
IDS = st.binary(min_size=1, max_size=255)


def decode(data: bytes) -> tuple[int, dict[str, int]]:
    """The result of ramrec_decode and the record's fields."""
    out = ffi.new("struct ramrec *")
    ret = lib.ramrec_decode(ffi.from_buffer(data), len(data), out)
    names = ("offset", "kind", "has_id", "id_at", "id_len", "head_len", "payload_len", "fill")
    return int(ret), {name: int(getattr(out, name)) for name in names}


def encode(offset: int, kind: int, idstr: bytes | None) -> bytes:
    buffer = bytearray(HEAD_MAX)
    name = ffi.NULL if idstr is None else ffi.from_buffer(idstr)
    written = lib.ramrec_encode(ffi.from_buffer(buffer), offset, kind, name, len(idstr or b""))
    return bytes(buffer[:written])


@given(OFFSETS, st.sampled_from([PAGE_FLAG, ZERO]), st.none() | IDS, st.integers(0, 255))
def test_a_record_comes_back_as_it_was(
    offset: int, kind: int, idstr: bytes | None, fill: int
) -> None:
    data = encode(offset, kind, idstr)
    flags = kind | (CONTINUE if idstr is None else 0)
    counted = b"" if idstr is None else bytes([len(idstr)]) + idstr
    assert data == struct.pack(">Q", offset | flags) + counted
    if kind == ZERO:
        data += bytes([fill])
    for length in range(len(data)):
        assert decode(data[:length])[0] == 0
    ret, record = decode(data + b"what follows")
    assert ret == 1
    assert record["head_len"] == len(data)
    assert (record["offset"], record["kind"]) == (offset, kind)
    assert data[record["id_at"] : record["id_at"] + record["id_len"]] == (idstr or b"")
    assert record["payload_len"] == (PAGE if kind == PAGE_FLAG else 0)
    assert record["fill"] == (fill if kind == ZERO else 0)


@given(st.binary(max_size=HEAD_MAX + 20))
@example(struct.pack(">Q", EOS))
@example(struct.pack(">Q", XBZRLE | CONTINUE) + b"\1\0\7")
@example(struct.pack(">Q", COMPRESS) + b"\1a\0\0\0\7")
def test_any_bytes(data: bytes) -> None:
    """A decision once the head is there, which no further byte changes; none of it from beyond."""
    answers = [decode(data[:length]) for length in range(len(data) + 1)]
    final, record = answers[-1]
    assert final in (0, 1, -errno.EINVAL)
    if final == 1:
        assert 8 <= record["head_len"] <= min(len(data), HEAD_MAX)
        assert record["id_at"] + record["id_len"] <= record["head_len"]
        assert answers[record["head_len"]] == (1, record)
        assert answers[record["head_len"] - 1][0] == 0
    else:
        assert final != 0 or len(data) < HEAD_MAX
        first = next((n for n, (ret, _) in enumerate(answers) if ret == final), 0)
        assert all(ret in (0, final) for ret, _ in answers[first:])


EDITS = st.lists(st.tuples(st.integers(0, PAGE - 1), st.binary(max_size=200)), max_size=12)


@given(st.binary(max_size=600), EDITS, st.integers(0, PAGE))
def test_xbzrle_there_and_back(start: bytes, edits: list[tuple[int, bytes]], room: int) -> None:
    """Encoded into any room: the very change again, or a refusal without a byte too many."""
    old = start.ljust(PAGE, b"\x11")
    new = bytearray(old)
    for at, data in edits:
        new[at : at + len(data)] = data[: PAGE - at]
    out = bytearray(room + 16)
    length = lib.xbzrle_encode(old, bytes(new), PAGE, ffi.from_buffer(out), room)
    assert out[room:] == bytes(16)
    if length < 0:
        assert length == -errno.EOVERFLOW
        return
    assert length <= room
    assert (length == 0) == (bytes(new) == old)
    page = bytearray(old)
    assert lib.xbzrle_decode(bytes(out[:length]), length, ffi.from_buffer(page), PAGE) == 0
    assert page == new


@given(st.binary(max_size=400), st.integers(1, PAGE))
def test_xbzrle_of_any_bytes_stays_in_its_page(data: bytes, page_len: int) -> None:
    page = bytearray(b"\x22" * (page_len + 64))
    ret = lib.xbzrle_decode(data, len(data), ffi.from_buffer(page), page_len)
    assert ret in (0, -errno.EINVAL)
    assert page[page_len:] == b"\x22" * 64


@given(st.lists(st.binary(max_size=300)), st.integers(0, (1 << 32) - 1))
def test_crc32c_in_pieces_and_by_table(parts: list[bytes], seed: int) -> None:
    """The instruction, the table, one go and any pieces agree."""
    whole = b"".join(parts)
    expected = lib.crc32c_portable(seed, whole, len(whole))
    assert crc32c(whole, seed) == expected
    crc = seed
    for part in parts:
        crc = crc32c(part, crc)
    assert crc == expected
