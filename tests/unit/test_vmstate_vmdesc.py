"""The description trailer as we write it, decoded again with nothing else in hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from migration.wire.errors import RemoteStreamError
from migration.wire.vmdesc import (
    DecodedStruct,
    decode_device,
    encode_device,
    payload_length,
)
from migration.wire.vmstate import (
    U8,
    U16,
    U32,
    Array,
    Bitmap,
    Bool,
    Buffer,
    CpuDouble,
    Custom,
    GTree,
    JsonText,
    PointerArray,
    PointerMarkers,
    QTailQ,
    String,
    Struct,
    StructArray,
    StructOf,
    Timer,
    Tmp,
    Unused,
    VArray,
    VBuffer,
    VMStateDescription,
    VStruct,
)
from tests.support.vmstate_objects import (
    Object,
    describe,
    described_fields,
    device,
    parsed_description,
)

POINT = VMStateDescription(name="point", version_id=1, fields=(U8("x"), U16("y")))
POINT_DESCRIBED = {
    "vmsd_name": "point",
    "version": 1,
    "fields": [
        {"name": "x", "type": "uint8", "size": 1},
        {"name": "y", "type": "uint16", "size": 2},
    ],
}


def point(x: int, y: int) -> Object:
    return Object(x=x, y=y)


def roundtrip(vmsd: VMStateDescription, obj: object) -> DecodedStruct:
    """Describe, decode, encode; returns what was decoded."""
    payload, text = describe(vmsd, obj)
    description = parsed_description(text)
    assert payload_length(description) == len(payload)
    decoded = decode_device(description, payload)
    assert encode_device(decoded) == payload
    return decoded.state


# -- what we write -------------------------------------------------------------------------------


def test_order_of_keys_is_qemus() -> None:
    vmsd = device(StructArray("v", POINT, count=2), Array("w", 3, U8), Struct("s", POINT))
    _, text = describe(vmsd, Object(v=[point(1, 2)] * 2, w=[1, 2, 3], s=point(1, 2)))
    assert text == (
        '{"name": "dev", "instance_id": 0, "vmsd_name": "dev", "version": 1, "fields": ['
        '{"name": "v", "array_len": 2, "type": "struct", "struct": {"vmsd_name": "point",'
        ' "version": 1, "fields": [{"name": "x", "type": "uint8", "size": 1},'
        ' {"name": "y", "type": "uint16", "size": 2}]}, "size": 3},'
        ' {"name": "w", "array_len": 3, "type": "uint8", "size": 1},'
        ' {"name": "s", "type": "struct", "struct": {"vmsd_name": "point", "version": 1,'
        ' "fields": [{"name": "x", "type": "uint8", "size": 1},'
        ' {"name": "y", "type": "uint16", "size": 2}]}, "size": 3}]}'
    )


def test_array_of_one_is_described_like_a_single_value_and_of_none_not_at_all() -> None:
    vmsd = device(
        Array("one", 1, U8), Array("none", 0, U8), U8("n"), VArray("v", count="n", element=U8)
    )
    assert described_fields(vmsd, Object(one=[1], none=[], n=0, v=[])) == [
        {"name": "one", "type": "uint8", "size": 1},
        {"name": "n", "type": "uint8", "size": 1},
    ]


@pytest.mark.parametrize(
    "inner",
    [
        (U8("a", test=lambda obj, version: obj.a > 1),),
        (U8("a"), VBuffer("b", size="a")),
        (Struct("deep", VMStateDescription(name="d", fields=(String("a"),)), attr=""),),
    ],
)
def test_elements_that_may_differ_are_described_one_by_one(inner: Any) -> None:
    """With a condition, a variable length or subsections inside, one description would not do for
    all.
    """
    vmsd = device(StructArray("v", VMStateDescription(name="i", fields=inner), count=2))
    elements = [Object(a=1, b=b"x"), Object(a=2, b=b"xy")]
    if isinstance(inner[0], type(Struct("x", POINT))) and inner[0].name == "deep":
        elements = [Object(a="p"), Object(a="quite long")]
    fields = described_fields(vmsd, Object(v=elements))
    assert [field["index"] for field in fields] == [0, 1]
    assert all("array_len" not in field for field in fields)
    roundtrip(vmsd, Object(v=elements))


def test_array_of_structs_with_subsections_is_described_one_by_one() -> None:
    sub = VMStateDescription(name="i/s", version_id=1, fields=(U8("b"),), needed=lambda obj: obj.b)
    inner = VMStateDescription(name="i", fields=(U8("a"),), subsections=(sub,))
    vmsd = device(StructArray("v", inner, count=3))
    obj = Object(v=[Object(a=1, b=0), Object(a=2, b=7), Object(a=3, b=0)])
    fields = described_fields(vmsd, obj)
    assert [field["size"] for field in fields] == [1, 1 + 1 + 1 + 3 + 4 + 1, 1]
    assert "subsections" in fields[1]["struct"]
    decoded = roundtrip(vmsd, obj)
    values = decoded["v"]
    assert isinstance(values, list)
    assert isinstance(values[1], DecodedStruct)
    subsection = values[1].subsection("i/s")
    assert subsection is not None
    assert subsection["b"] == 7
    assert values[1].subsection("i/other") is None


def test_same_name_twice_gets_numbers() -> None:
    vmsd = device(U8("a"), U16("config"), U8("b"), U32("config"), Unused(1), Unused(2))
    names = [field["name"] for field in described_fields(vmsd, Object(a=1, b=2, config=3))]
    assert names == ["a", "config[0]", "b", "config[1]", "unused[0]", "unused[1]"]


def test_absent_fields_are_not_described() -> None:
    vmsd = device(U8("a"), U8("b", test=lambda obj, version: False), U8("c", version_id=9))
    assert [field["name"] for field in described_fields(vmsd, Object(a=1))] == ["a"]


def test_inline_kinds_describe_themselves_inside_the_field_object() -> None:
    vmsd = device(VStruct("v", POINT, struct_version_id=1), Tmp(POINT, new=lambda parent: parent.v))
    fields = described_fields(vmsd, Object(v=point(1, 2)))
    assert fields[0] == {"name": "v", "type": "vstruct", **POINT_DESCRIBED, "size": 3}
    assert fields[1] == {"name": "tmp", "type": "tmp", **POINT_DESCRIBED, "size": 3}
    roundtrip(vmsd, Object(v=point(1, 2)))


def test_runs_of_null_pointers_are_arrays_of_their_own() -> None:
    """As newer QEMUs do it; the nulls have a type of their own."""
    vmsd = device(PointerArray("v", count=6, element=StructOf(POINT)))
    obj = Object(v=[point(1, 1), point(2, 2), None, None, None, point(3, 3)])
    fields = described_fields(vmsd, obj)
    assert [(f["type"], f.get("array_len"), f["size"]) for f in fields] == [
        *(("struct", 2, 3), ("nullptr", 3, 1), ("struct", None, 3)),
    ]
    values = roundtrip(vmsd, obj)["v"]
    assert isinstance(values, list)
    assert [value is None for value in values] == [False, False, True, True, True, False]


def test_list_elements_repeat_their_keys_and_are_kept_apart() -> None:
    """QEMU's own habit; plain JSON readers keep the last one only."""
    inner = VMStateDescription(name="i", version_id=1, fields=(U8("n"), VBuffer("b", size="n")))
    vmsd = device(QTailQ("v", inner, new=Object), U8("end"))
    obj = Object(v=[Object(n=1, b=b"x"), Object(n=3, b=b"xyz")], end=9)
    payload, text = describe(vmsd, obj)
    assert text.count('"vmsd_name": "i"') == 2
    description = parsed_description(text)
    assert len(description["fields"][0]["elements"]) == 2
    values = roundtrip(vmsd, obj)["v"]
    assert isinstance(values, list)
    assert [value["b"] for value in values if isinstance(value, DecodedStruct)] == [b"x", b"xyz"]
    with pytest.raises(RemoteStreamError):
        decode_device(json.loads(text), payload)
    same = Object(v=[Object(n=1, b=b"x"), Object(n=1, b=b"y")], end=9)
    payload, text = describe(vmsd, same)
    assert encode_device(decode_device(json.loads(text), payload)) == payload


def test_trees_with_either_kind_of_key() -> None:
    direct = device(GTree("v", POINT, new=Object))
    values = roundtrip(direct, Object(v={7: point(1, 2), 9: point(3, 4)}))["v"]
    assert isinstance(values, list)
    assert [node[0] for node in values if isinstance(node, tuple)] == [7, 9]
    keyed = device(GTree("v", POINT, new=Object, key_vmsd=POINT, key_new=Object))
    values = roundtrip(keyed, Object(v=[(point(5, 6), point(7, 8))]))["v"]
    assert isinstance(values, list)
    node = values[0]
    assert isinstance(node, tuple)
    assert isinstance(node[0], DecodedStruct)
    assert node[0]["x"] == 5
    roundtrip(direct, Object(v={}))
    roundtrip(device(QTailQ("v", POINT, new=Object)), Object(v=[]))


def test_values_are_interpreted_by_type() -> None:
    vmsd = device(
        Bool("flag"),
        Timer("off"),
        Timer("on"),
        CpuDouble("real"),
        Bitmap("map", nbits=70),
        Buffer("raw", 2),
        Custom("own", "secret", save=lambda w, v: w.write(v), load=lambda r, c: r.read(3)),
        Unused(2),
        PointerArray("p", count=2, element=U8, markers=PointerMarkers.ALL),
    )
    obj = Object(
        flag=True, off=None, on=5, real=1.5, map=1 << 69 | 1, raw=b"ab", own=b"xyz", p=[None, 7]
    )
    state = roundtrip(vmsd, obj)
    assert [state[name] for name in ("flag", "off", "on", "real", "map", "raw", "own")] == [
        *(True, None, 5, 1.5, 1 << 69 | 1, b"ab", b"xyz"),
    ]
    assert state["unused"] == bytes(2)
    assert [(entry.type, entry.value) for entry in state.fields[-3:]] == [
        *(("ptr-marker", False), ("ptr-marker", True), ("uint8", 7)),
    ]
    with pytest.raises(KeyError):
        state["nothing"]


def test_odd_names_are_escaped() -> None:
    text = JsonText()
    text.start_object()
    text.string("k", 'a"b\\c\n\t\x01é😀')
    text.end_object()
    assert text.text() == '{"k": "a\\"b\\\\c\\n\\t\\u0001\\u00E9\\uD83D\\uDE00"}'
    assert json.loads(text.text())["k"] == 'a"b\\c\n\t\x01é😀'
