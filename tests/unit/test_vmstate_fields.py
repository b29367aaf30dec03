"""Every kind of field: its exact bytes, its way back, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from migration.wire.errors import LocalStreamError, TruncatedStreamError
from migration.wire.vmstate import (
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    Bitmap,
    BitmapOf,
    Bool,
    Buffer,
    BufferOf,
    CpuDouble,
    Field,
    GTree,
    Pointer,
    PointerArray,
    PointerMarkers,
    QList,
    QTailQ,
    String,
    Struct,
    StructArray,
    StructOf,
    Timer,
    VMStateDescription,
    VStruct,
)
from tests.support.vmstate_objects import Object, device, load, save

POINT = VMStateDescription(name="point", version_id=1, fields=(U8("x"), U16("y")))


def point(x: int, y: int) -> Object:
    return Object(x=x, y=y)


ONE_FIELD: list[tuple[str, Field, Any, str]] = [
    ("u8", U8("v"), 0xFE, "fe"),
    ("u16", U16("v"), 0xFEDC, "fedc"),
    ("u32", U32("v"), 0xFEDCBA98, "fedcba98"),
    ("u64", U64("v"), 0xFEDCBA9876543210, "fedcba9876543210"),
    ("i8", I8("v"), -2, "fe"),
    ("i16", I16("v"), -292, "fedc"),
    ("i32", I32("v"), -19088744, "fedcba98"),
    ("i64", I64("v"), -81985529216486896, "fedcba9876543210"),
    ("true", Bool("v"), True, "01"),
    ("false", Bool("v"), False, "00"),
    ("timer", Timer("v"), 1_000_000_000, "000000003b9aca00"),
    ("timer off", Timer("v"), None, "ffffffffffffffff"),
    ("double", CpuDouble("v"), -2.5, "c004000000000000"),
    ("buffer", Buffer("v", 4), b"\x00\x01\x02\x03", "00010203"),
    ("array", Array("v", 3, U16), [1, 2, 0xFFFF], "00010002ffff"),
    ("empty array", Array("v", 0, U16), [], ""),
    ("array of timers", Array("v", 2, Timer), [None, 1], "ff" * 8 + "00" * 7 + "01"),
    ("array of buffers", Array("v", 2, BufferOf(2)), [b"ab", b"cd"], "61626364"),
    ("array of bools", Array("v", 2, Bool), [True, False], "0100"),
    ("bitmap", Bitmap("v", nbits=64), 1 << 63 | 1, "8000000000000001"),
    ("short bitmap", Bitmap("v", nbits=3), 0b101, "0000000000000005"),
    ("long bitmap", Bitmap("v", nbits=65), 1 << 64 | 2, "0000000000000002" + "0000000000000001"),
    ("no bitmap", Bitmap("v", nbits=0), 0, ""),
    ("bitmaps", Array("v", 2, BitmapOf(8)), [1, 2], "0000000000000001" + "0000000000000002"),
    ("string", String("v"), "hé", "00000003" + "68c3a9"),
    ("short string", String("v", prefix=U8), "ok", "02" + "6f6b"),
    ("struct", Struct("v", POINT, new=Object), point(1, 2), "010002"),
    (
        "structs",
        StructArray("v", POINT, count=2, new=Object),
        [point(1, 2), point(3, 4)],
        "010002030004",
    ),
    ("vstruct", VStruct("v", POINT, struct_version_id=1, new=Object), point(1, 2), "010002"),
    ("pointer", Pointer("v", POINT, new=Object), point(9, 8), "090008"),
    ("pointer to scalar", Pointer("v", U32), 7, "00000007"),
    (
        "tail queue",
        QTailQ("v", POINT, new=Object),
        [point(1, 2), point(3, 4)],
        "01010002" + "01030004" + "00",
    ),
    ("empty queue", QTailQ("v", POINT, new=Object), [], "00"),
    ("list", QList("v", POINT, new=Object), [point(1, 2)], "01010002" + "00"),
    (
        "tree",
        GTree("v", POINT, new=Object),
        {5: point(1, 2), 258: point(3, 4)},
        "00000002"
        + "01"
        + "0000000000000005"
        + "010002"
        + "01"
        + "0000000000000102"
        + "030004"
        + "00",
    ),
    ("empty tree", GTree("v", POINT, new=Object), {}, "00000000" + "00"),
    (
        "tree with struct keys",
        GTree("v", POINT, new=Object, key_vmsd=POINT, key_new=Object),
        [(point(1, 1), point(2, 2))],
        "00000001" + "01" + "010001" + "020002" + "00",
    ),
    (
        "marked pointers",
        PointerArray("v", count=3, element=StructOf(POINT, new=Object), markers=PointerMarkers.ALL),
        [None, point(1, 2), None],
        "30" + "31010002" + "30",
    ),
    (
        "pointers with nulls",
        PointerArray(
            "v",
            count=3,
            element=StructOf(POINT, new=Object),
            present=lambda obj: [True, False, True],
        ),
        [point(1, 2), None, point(3, 4)],
        "010002" + "30" + "030004",
    ),
]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [pytest.param(field, value, text, id=name) for name, field, value, text in ONE_FIELD],
)
def test_bytes_and_the_way_back(field: Field, value: Any, expected: str) -> None:
    vmsd = device(field)
    assert save(vmsd, Object(v=value)).hex() == expected
    assert load(vmsd, Object(), bytes.fromhex(expected)).v == value


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [pytest.param(field, value, text, id=name) for name, field, value, text in ONE_FIELD],
)
def test_every_truncation_names_section_field_and_offset(
    field: Field, value: Any, expected: str
) -> None:
    vmsd = device(U8("first"), field)
    whole = b"\x55" + bytes.fromhex(expected)
    for length in range(len(whole)):
        with pytest.raises(TruncatedStreamError) as caught:
            load(vmsd, Object(), whole[:length])
        assert caught.value.section == "dev"
        assert 0 <= caught.value.offset <= length
        assert ("field v" if length else "field first") in caught.value.reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (U8("v"), 256),
        (U8("v"), -1),
        (U8("v"), "1"),
        (U8("v"), None),
        (I8("v"), 128),
        (I16("v"), -32769),
        (U64("v"), 1 << 64),
        (Bool("v"), 2),
        (Timer("v"), -1),
        (Timer("v"), (1 << 64) - 1),
        (CpuDouble("v"), "x"),
        (Buffer("v", 4), b"abc"),
        (Buffer("v", 4), 4),
        (Array("v", 3, U8), [1, 2]),
        (Array("v", 2, U8), [1, 300]),
        (Array("v", 2, U8), None),
        (Bitmap("v", nbits=3), 8),
        (Bitmap("v", nbits=3), -1),
        (Pointer("v", POINT), None),
        (Struct("v", POINT), None),
        (String("v", limit=2), "abc"),
        (String("v", prefix=U8), "x" * 256),
        (GTree("v", POINT, new=Object), {1 << 64: point(1, 1)}),
        (Struct("v", POINT), point(1, 1 << 16)),
    ],
)
def test_value_that_does_not_fit_is_refused_by_name(field: Field, value: Any) -> None:
    with pytest.raises(LocalStreamError, match=r"section 'dev' at stream offset .*: field v"):
        save(device(field), Object(v=value))


def test_missing_attribute_is_named() -> None:
    with pytest.raises(LocalStreamError, match=r"field v.*no such value"):
        save(device(U8("v")), Object())


def test_nested_place_is_named_to_the_element() -> None:
    inner = VMStateDescription(name="inner", fields=(StructArray("points", POINT, count=2),))
    vmsd = device(Struct("a", inner), Array("b", 3, U8))
    good = Object(a=Object(points=[point(0, 0), point(0, 0)]), b=[1, 2, 3])
    with pytest.raises(TruncatedStreamError, match=r"field a\.points\[1\]\.y: ") as caught:
        load(vmsd, good, save(vmsd, good)[:5])
    assert caught.value.offset == 4
    good.a.points[1].y = -1
    with pytest.raises(LocalStreamError, match=r"field a\.points\[1\]\.y: -1 does not fit uint16"):
        save(vmsd, good)
    good.a.points[1].y, good.b = 1, [1, 2, 333]
    with pytest.raises(LocalStreamError, match=r"field b\[2\]: 333"):
        save(vmsd, good)
