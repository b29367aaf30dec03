"""What fields check, bound and keep: counts, matching values, things loaded in place, helpers,
text.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest

from migration.wire.errors import LocalStreamError, RemoteStreamError, TruncatedStreamError
from migration.wire.io import BytesReader, Reader, Writer
from migration.wire.vmstate import (
    I32,
    U8,
    U16,
    U32,
    Bitmap,
    Bool,
    Buffer,
    CpuDouble,
    Custom,
    Field,
    GTree,
    I32Equal,
    I32Le,
    PointerArray,
    PointerMarkers,
    QList,
    QTailQ,
    Single,
    String,
    Struct,
    StructArray,
    StructOf,
    SubArray,
    Tmp,
    U8Equal,
    U16Equal,
    U32Equal,
    U64Equal,
    Unused,
    Validate,
    VArray,
    VBuffer,
    VMStateDescription,
)
from tests.support.vmstate_objects import Object, device, load, save

POINT = VMStateDescription(name="point", version_id=1, fields=(U8("x"), U16("y")))


def point(x: int, y: int) -> Object:
    return Object(x=x, y=y)


# -- counts and lengths from other fields --------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "prefix"), [(U8, "02"), (U16, "0002"), (U32, "00000002"), (I32, "00000002")]
)
def test_variable_array_takes_its_count_from_a_field_of_any_width(count: Any, prefix: str) -> None:
    vmsd = device(count("n"), VArray("v", count="n", element=U16))
    assert save(vmsd, Object(n=2, v=[1, 2])).hex() == prefix + "00010002"
    assert load(vmsd, Object(), bytes.fromhex(prefix + "00010002")).v == [1, 2]
    with pytest.raises(LocalStreamError, match="1 elements, the count says 2"):
        save(vmsd, Object(n=2, v=[1]))


def test_multiplied_counts_and_sizes() -> None:
    vmsd = device(
        U8("n"),
        VArray("v", count="n", multiply=3, element=U8),
        VBuffer("b", size="n", multiply=2),
        VArray("c", count=lambda obj: obj.n - 1, element=U8),
    )
    obj = Object(n=2, v=[1, 2, 3, 4, 5, 6], b=b"abcd", c=[9])
    payload = save(vmsd, obj)
    assert payload.hex() == "02" + "010203040506" + "61626364" + "09"
    assert load(vmsd, Object(), payload) == obj


def test_unused_space_is_zeros_out_and_anything_in() -> None:
    vmsd = device(U8("n"), Unused(3), Unused(2, count="n"), U8("end"))
    assert save(vmsd, Object(n=2, end=7)).hex() == "02" + "000000" + "00000000" + "07"
    assert load(vmsd, Object(), bytes.fromhex("02" + "112233" + "44556677" + "07")).end == 7


@pytest.mark.parametrize(
    ("field", "count", "reason"),
    [
        (VArray("v", count="n", element=U8, limit=4), 5, "5 elements, limit is 4"),
        (VArray("v", count="n", element=U8), -1, "negative count -1"),
        (VBuffer("v", size="n", limit=4), 5, "5 bytes, limit is 4"),
        (VBuffer("v", size="n"), -1, "-1 bytes"),
        (Bitmap("v", nbits="n", limit=64), 65, "65 bits, limit is 64"),
        (Bitmap("v", nbits="n"), -5, "-5 bits"),
        (PointerArray("v", count="n", element=U8, limit=4), 5, "5 elements, limit is 4"),
        (Unused(1, count="n", limit=4), 5, "5 elements, limit is 4"),
    ],
)
def test_hostile_length_is_refused_before_anything_is_read(
    field: Field, count: int, reason: str
) -> None:
    payload = count.to_bytes(4, "big", signed=True) + bytes(64)
    with pytest.raises(RemoteStreamError, match=reason) as caught:
        load(device(I32("n"), field), Object(), payload)
    assert caught.value.offset == 4


def test_length_field_must_be_sent_before() -> None:
    with pytest.raises(ValueError, match="'n' must be sent before 'v'"):
        device(VArray("v", count="n", element=U8), U8("n"))


def test_sub_array_leaves_the_rest_alone() -> None:
    vmsd = device(SubArray("v", 1, 2, U16))
    assert save(vmsd, Object(v=[9, 1, 2, 9])).hex() == "00010002"
    assert load(vmsd, Object(v=[7, 0, 0, 8]), bytes.fromhex("00010002")).v == [7, 1, 2, 8]
    assert load(device(SubArray("v", 1, 2, U8)), Object(v=bytearray(4)), b"\x05\x06").v == bytes(
        [0, 5, 6, 0]
    )


# -- values that must match ----------------------------------------------------------------------


@pytest.mark.parametrize("element", [U8Equal, U16Equal, U32Equal, I32Equal, U64Equal])
def test_equal_field_accepts_only_our_own_value(element: Any) -> None:
    vmsd = device(element("v"))
    payload = save(vmsd, Object(v=5))
    assert len(payload) == element.length
    assert load(vmsd, Object(v=5), payload).v == 5
    with pytest.raises(RemoteStreamError, match="0x5 in the stream, 6 here") as caught:
        load(vmsd, Object(v=6), payload)
    assert caught.value.offset == 0


def test_equal_field_can_say_what_to_do() -> None:
    vmsd = device(U32Equal.with_hint("use the same queue-size on both sides")("v"))
    with pytest.raises(RemoteStreamError, match="use the same queue-size on both sides"):
        load(vmsd, Object(v=6), save(vmsd, Object(v=5)))


@pytest.mark.parametrize(("received", "fine"), [(0, True), (3, True), (4, False), (-1, False)])
def test_le_field_is_bounded_by_our_own_value(received: int, fine: bool) -> None:
    payload = save(device(I32("v")), Object(v=received))
    if fine:
        assert load(device(I32Le("v")), Object(v=3), payload).v == received
    else:
        with pytest.raises(RemoteStreamError, match=r"must be 0\.\.3"):
            load(device(I32Le("v")), Object(v=3), payload)


def test_validation_holds_on_both_sides() -> None:
    vmsd = device(U8("v"), Validate("v below 4", lambda obj, version: obj.v < 4), U8("w"))
    assert save(vmsd, Object(v=3, w=1)) == b"\x03\x01"
    with pytest.raises(LocalStreamError, match="field v below 4: this condition does not hold"):
        save(vmsd, Object(v=4, w=1))
    with pytest.raises(RemoteStreamError, match="field v below 4") as caught:
        load(vmsd, Object(), b"\x04\x01")
    assert caught.value.offset == 1


# -- things with a shape of their own ------------------------------------------------------------


def test_any_other_byte_is_true() -> None:
    assert load(device(Bool("v")), Object(), b"\x80").v is True


def test_double_keeps_every_bit_of_a_nan() -> None:
    for bits in (0x7FF8_0000_0000_0001, 0xFFF0_DEAD_BEEF_0001, 0x8000_0000_0000_0000):
        payload = bits.to_bytes(8, "big")
        obj = load(device(CpuDouble("v")), Object(), payload)
        assert save(device(CpuDouble("v")), obj) == payload
    assert math.isnan(struct.unpack(">d", (0xFFF0_DEAD_BEEF_0001).to_bytes(8, "big"))[0])


def test_mutable_buffer_is_filled_in_place() -> None:
    held = bytearray(4)
    obj = load(device(Buffer("v", 4)), Object(v=held), b"abcd")
    assert obj.v is held
    assert held == b"abcd"
    view = memoryview(bytearray(6))[1:5]
    assert load(device(Buffer("v", 4)), Object(v=view), b"abcd").v is view
    assert load(device(Buffer("v", 4)), Object(v=bytearray(3)), b"abcd").v == b"abcd"
    frozen = memoryview(bytes(4))
    assert load(device(Buffer("v", 4)), Object(v=frozen), b"abcd").v == b"abcd"


def test_structs_are_loaded_in_place_where_there_are_any() -> None:
    vmsd = device(U8("n"), StructArray("v", POINT, count="n", new=Object))
    first = point(0, 0)
    obj = load(vmsd, Object(v=[first]), bytes.fromhex("02" + "010002" + "030004"))
    assert obj.v[0] is first
    assert first == point(1, 2)
    assert obj.v[1] == point(3, 4)


def test_struct_without_an_object_needs_a_factory() -> None:
    with pytest.raises(RemoteStreamError, match="field v: no point object to load into"):
        load(device(Struct("v", POINT)), Object(), bytes(3))


def test_bitmap_bits_beyond_its_end_are_refused() -> None:
    with pytest.raises(RemoteStreamError, match="bits beyond the 3"):
        load(device(Bitmap("v", nbits=3)), Object(), (8).to_bytes(8, "big"))


@pytest.mark.parametrize("field", [QTailQ("v", POINT, new=Object), QList("v", POINT, new=Object)])
def test_list_marks_are_checked_and_bounded(field: Field) -> None:
    with pytest.raises(RemoteStreamError, match="0x02 where a list goes on") as caught:
        load(device(field), Object(), bytes.fromhex("01010002" + "02"))
    assert caught.value.offset == 4
    short = device(QTailQ("v", POINT, new=Object, limit=1))
    with pytest.raises(RemoteStreamError, match="more than 1 elements"):
        load(short, Object(), bytes.fromhex("01010002" + "01010002" + "00"))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ("00000001" + "00", "0 nodes, 1 announced"),
        ("00000000" + "01" + "00" * 11 + "00", "more than the 0 nodes"),
        ("00000002" + ("01" + "00" * 11) * 2 + "00", "a key comes twice"),
        ("00010001", "65537 elements, limit is 65536"),
        ("00000001" + "07", "0x07 where a list"),
    ],
)
def test_inconsistent_tree_is_refused(payload: str, reason: str) -> None:
    with pytest.raises(RemoteStreamError, match=reason):
        load(device(GTree("v", POINT, new=Object)), Object(), bytes.fromhex(payload))


def test_tree_nodes_go_out_in_key_order() -> None:
    vmsd = device(GTree("v", POINT, new=Object))
    assert save(vmsd, Object(v={9: point(1, 1), 2: point(2, 2)})) == save(
        vmsd, Object(v={2: point(2, 2), 9: point(1, 1)})
    )


def test_pointer_array_without_markers_follows_the_receivers_own_nulls() -> None:
    """As in every QEMU: the bytes do not tell, so the receiver's own array does."""
    vmsd = device(PointerArray("v", count=3, element=StructOf(POINT)))
    payload = save(vmsd, Object(v=[None, point(1, 2), None]))
    assert payload.hex() == "30" + "010002" + "30"
    kept = point(0, 0)
    obj = load(vmsd, Object(v=[None, kept, None]), payload)
    assert obj.v[1] is kept
    assert kept == point(1, 2)
    with pytest.raises(RemoteStreamError, match=r"field v\[1\]: 0x01 where a null") as caught:
        load(vmsd, Object(v=[None, None, None]), payload)
    assert caught.value.offset == 1


def test_marked_pointer_array_makes_and_drops_objects() -> None:
    element = StructOf(POINT, new=Object)
    vmsd = device(PointerArray("v", count=2, element=element, markers=PointerMarkers.ALL))
    assert load(vmsd, Object(v=[point(9, 9), None]), bytes.fromhex("30" + "31010002")).v == [
        None,
        point(1, 2),
    ]
    with pytest.raises(RemoteStreamError, match="0x32 is not a pointer marker"):
        load(vmsd, Object(), b"\x32\x30")


def test_pointer_array_may_hold_scalars() -> None:
    vmsd = device(
        U8("n"), PointerArray("v", count="n", element=U32, present=lambda obj: [False, True])
    )
    obj = Object(n=2, v=[None, 5])
    assert save(vmsd, obj).hex() == "02" + "30" + "00000005"
    assert load(vmsd, Object(), save(vmsd, obj)) == obj
    with pytest.raises(LocalStreamError, match="2 elements, the count says 3"):
        save(vmsd, Object(n=3, v=[1, 2]))


class Halves:
    """A helper that splits its parent's number for the wire."""

    def __init__(self, parent: Any) -> None:
        self.parent = parent
        self.high = self.low = 0


def test_tmp_helper_lives_only_while_saved_or_loaded() -> None:
    def split(half: Halves) -> None:
        half.high, half.low = divmod(half.parent.number, 256)

    def join(half: Halves, version_id: int) -> None:
        half.parent.number = half.high * 256 + half.low

    halves = VMStateDescription(
        name="halves", version_id=1, fields=(U8("high"), U8("low")), pre_save=split, post_load=join
    )
    vmsd = device(U8("before"), Tmp(halves, new=Halves))
    assert save(vmsd, Object(before=1, number=0x1234)).hex() == "01" + "1234"
    assert load(vmsd, Object(), bytes.fromhex("011234")) == Object(before=1, number=0x1234)


def _save_words(writer: Writer, value: list[str]) -> None:
    data = " ".join(value).encode("ascii")
    writer.write(bytes([len(data)]) + data)


def _load_words(reader: Reader, current: object) -> list[str]:
    return reader.read(reader.read(1)[0]).decode("ascii").split(" ")


def test_custom_encoding_errors_name_the_field_too() -> None:
    vmsd = device(U8("before"), Custom("v", "words", save=_save_words, load=_load_words))
    assert save(vmsd, Object(before=1, v=["a", "b"])) == b"\x01\x03a b"
    assert load(vmsd, Object(), b"\x01\x03a b").v == ["a", "b"]
    with pytest.raises(TruncatedStreamError, match="field v: wanted 3 bytes"):
        load(vmsd, Object(), b"\x01\x03a")
    with pytest.raises(RemoteStreamError, match=r"field v: words: .*ascii") as caught:
        load(vmsd, Object(), b"\x01\x01\xff")
    assert caught.value.offset == 1
    with pytest.raises(LocalStreamError, match=r"field v: words: .*ascii"):
        save(vmsd, Object(before=1, v=["é"]))


def test_wrong_text_is_refused() -> None:
    with pytest.raises(RemoteStreamError, match="field v: not UTF-8") as caught:
        load(device(String("v")), Object(), b"\0\0\0\x02\xc3\x28")
    assert caught.value.offset == 4
    with pytest.raises(RemoteStreamError, match="5 bytes of text, limit is 4"):
        load(device(String("v", limit=4)), Object(), b"\0\0\0\x05hello")


def test_attribute_paths() -> None:
    vmsd = device(
        U8("queue.count"),
        U8("bus[1].status"),
        U8("lines[0]"),
        Single("renamed", U8, attr="other"),
    )
    obj = Object(queue=Object(count=1), bus=[Object(), Object(status=2)], lines=[3], other=4)
    assert save(vmsd, obj) == b"\x01\x02\x03\x04"
    fresh = Object(queue=Object(), bus=[Object(), Object()], lines=[0])
    assert load(vmsd, fresh, b"\x01\x02\x03\x04") == obj
    with pytest.raises(ValueError, match="not an attribute path"):
        U8("a b")


def test_long_buffer_is_read_in_pieces() -> None:
    """A made-up length costs no memory before its bytes are there."""
    requested: list[int] = []

    class Recorder(BytesReader):
        def read(self, length: int) -> bytes:
            requested.append(length)
            return super().read(length)

    vmsd = device(U32("n"), VBuffer("v", size="n"))
    payload = (5 << 20).to_bytes(4, "big") + bytes(5 << 20)
    obj = Object()
    vmsd.load(Recorder(payload), obj, 1)
    assert len(obj.v) == 5 << 20
    assert max(requested) <= 1 << 20
    with pytest.raises(TruncatedStreamError):
        vmsd.load(Recorder((16 << 20).to_bytes(4, "big") + bytes(100)), Object(), 1)
