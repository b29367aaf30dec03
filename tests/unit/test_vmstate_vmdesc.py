"""The description trailer: what we write into it, and decoding with descriptions of every QEMU's
making.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from migration.wire.errors import LocalStreamError, RemoteStreamError, TruncatedStreamError
from migration.wire.vmdesc import (
    DecodedStruct,
    decode_device,
    encode_device,
    parse_vmdesc,
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


# -- descriptions of other QEMUs -----------------------------------------------------------------


def described(*fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": "dev",
        "instance_id": 0,
        "vmsd_name": "dev",
        "version": 1,
        "fields": [*fields],
        **more,
    }


def test_null_pointer_as_7_2_describes_it() -> None:
    """An empty struct of size 1."""
    description = described(
        {"name": "p", "index": 0, "type": "struct", "struct": {}, "size": 1},
        {"name": "p", "index": 1, "type": "struct", "struct": POINT_DESCRIBED, "size": 3},
    )
    device_ = decode_device(description, b"0\x01\x00\x02")
    values = device_.state["p"]
    assert isinstance(values, list)
    assert values[0] is None
    assert encode_device(device_) == b"0\x01\x00\x02"
    with pytest.raises(RemoteStreamError, match="no null marker"):
        decode_device(description, b"1\x01\x00\x02")


def test_old_style_section_is_one_field_of_bytes() -> None:
    fields = [{"name": "data", "size": 3, "type": "buffer"}]
    description = {"name": "slirp", "instance_id": 1, "size": 3, "fields": fields}
    decoded = decode_device(description, b"abc")
    assert decoded.is_old_style
    assert (decoded.name, decoded.instance_id) == ("slirp", 1)
    assert decoded.state["data"] == b"abc"
    assert encode_device(decoded) == b"abc"
    empty = decode_device({"name": "slirp", "instance_id": 0, "size": 0, "fields": []}, b"")
    assert encode_device(empty) == b""


def test_capabilities_of_different_lengths_are_taken_apart() -> None:
    """Only the first of an array is described, yet the names carry their lengths."""
    description = described({"name": "caps", "array_len": 2, "type": "capability", "size": 11})
    decoded = decode_device(description, b"\x0amapped-ram" + b"\x03abc")
    assert decoded.state["caps"] == ["mapped-ram", "abc"]
    assert encode_device(decoded) == b"\x0amapped-ram\x03abc"


def test_byte_that_is_no_bool_survives() -> None:
    decoded = decode_device(described({"name": "b", "type": "bool", "size": 1}), b"\x07")
    assert decoded.state["b"] == 7
    assert encode_device(decoded) == b"\x07"


@pytest.mark.parametrize(
    ("fields", "payload", "reason"),
    [
        (
            [{"name": "a", "type": "uint32", "size": 4}],
            b"\0\0\0\0\0",
            "1 bytes more than described",
        ),
        ([{"name": "a", "type": "uint32", "size": 3}], b"\0\0\0", "an integer of 3 bytes"),
        ([{"name": "a", "type": "timer", "size": 4}], bytes(8), "8 bytes, described as 4"),
        ([{"name": "a", "type": "bool", "size": 2}], bytes(2), "1 bytes, described as 2"),
        ([{"name": "a", "type": "bitmap", "size": 7}], bytes(8), "a bitmap of 7 bytes"),
        ([{"name": "a", "type": "buffer", "size": -1}], b"", "description has size -1"),
        ([{"name": "a", "type": "buffer", "size": True}], b"\0", "description has size True"),
        ([{"name": "a", "type": "buffer"}], b"", "description has size None"),
        ([{"name": 5, "type": "buffer", "size": 1}], b"\0", "description has name 5"),
        ([{"name": "a", "type": [], "size": 1}], b"\0", r"description has type \[\]"),
        ([{"name": "a", "type": "struct", "size": 3}], bytes(3), "a struct without a description"),
        ([{"name": "a", "type": "struct", "struct": 1, "size": 3}], bytes(3), "a struct without"),
        (
            [{"name": "a", "type": "struct", "struct": POINT_DESCRIBED, "size": 4}],
            bytes(4),
            "3 bytes, described as 4",
        ),
        ([{"name": "a", "type": "qtailq", "size": 4}], b"\1\0\0\0", "elements are not described"),
        ([{"name": "a", "type": "qtailq", "size": 1}], b"\2", "0x02 where a list"),
        (
            [{"name": "a", "type": "qtailq", **POINT_DESCRIBED, "size": 4}],
            b"\1\0\0\0\1\0\0\0",
            "past its described size",
        ),
        (
            [{"name": "a", "type": "gtree", "size": 5}],
            bytes([0, 0, 0, 1, 0]),
            "0 nodes, 1 announced",
        ),
        ([{"name": "a", "type": "nullptr", "size": 1}], b"\0", "no null marker"),
        ([{"name": "a", "type": "ptr-marker", "size": 1}], b"\0", "no pointer marker"),
        ([{"name": "a", "array_len": 1 << 30, "type": "x", "size": 0}], b"", "elements"),
        ([{"name": "a", "array_len": 1 << 17, "type": "x", "size": 0}], b"", "elements of no size"),
        (
            [{"name": "a", "array_len": "2", "type": "uint8", "size": 1}],
            b"\0\0",
            "has array_len '2'",
        ),
        (5, b"", "is not an array of objects"),
        ([5], b"", "is not an array of objects"),
    ],
)
def test_description_that_does_not_fit_is_refused(fields: Any, payload: bytes, reason: str) -> None:
    description = {"name": "dev", "vmsd_name": "dev", "version": 1, "fields": fields}
    with pytest.raises(RemoteStreamError, match=reason) as caught:
        decode_device(description, payload, offset=1000, section="package/dev")
    assert caught.value.section == "package/dev"
    assert 1000 <= caught.value.offset <= 1000 + len(payload)


def test_payload_shorter_than_described() -> None:
    fields = [{"name": "a", "type": "uint32", "size": 4}]
    with pytest.raises(TruncatedStreamError, match="field a: wanted 4 bytes, 3 left"):
        decode_device(described(*fields), b"\0\0\0")
    huge = {"name": "a", "array_len": 1 << 20, "type": "uint64", "size": 8}
    with pytest.raises(TruncatedStreamError, match="wanted 8388608 bytes"):
        decode_device(described(huge), b"\0\0\0")


def test_described_subsection_must_be_there() -> None:
    sub = {"vmsd_name": "dev/x", "version": 1, "fields": []}
    description = described(subsections=[sub])
    good = b"\x05\x05dev/x\0\0\0\x01"
    assert encode_device(decode_device(description, good)) == good
    for bad in (good[:-1], b"\x05\x05dev/y\0\0\0\x01", good[:-1] + b"\x02", b""):
        with pytest.raises(RemoteStreamError, match="subsection 'dev/x' version 1 is described"):
            decode_device(description, bad)


def test_deep_description_is_refused() -> None:
    inner: dict[str, Any] = POINT_DESCRIBED
    for _ in range(100):
        field = {"name": "f", "type": "struct", "struct": inner, "size": 3}
        inner = {"vmsd_name": "s", "version": 1, "fields": [field]}
    with pytest.raises(RemoteStreamError, match="nested deeper than 64"):
        decode_device({"name": "dev", **inner}, bytes(3))
    for _ in range(100):
        inner = {"vmsd_name": "s", "version": 1, "fields": [], "subsections": [inner]}
    with pytest.raises(ValueError, match="nested too deep"):
        payload_length(inner)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"\xff",
        b'{"devices": 5}',
        b'{"devices": [5]}',
        b'{"page_size": "x"}',
        b'{"configuration": []}',
        b"[" * 100_000,
        b'{"page_size": ' + b"9" * 5000 + b"}",
    ],
)
def test_trailer_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteStreamError) as caught:
        parse_vmdesc(data, offset=50)
    assert caught.value.section == "vmdescription"
    assert caught.value.offset >= 50


def test_the_least_trailer() -> None:
    parsed = parse_vmdesc(b"{}")
    assert (parsed.page_size, parsed.devices, parsed.configuration) == (None, (), None)


# -- encoding changed values ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("a", 256), ("a", "x"), ("b", b"x"), ("c", -1), ("d", 1.5), ("e", [1]), ("f", 2), ("g", None)],
)
def test_changed_value_must_fit(name: str, value: Any) -> None:
    vmsd = device(
        U8("a"),
        Buffer("b", 2),
        Timer("c"),
        Bitmap("d", nbits=8),
        Array("e", 2, U8),
        CpuDouble("f"),
        U8("g"),
    )
    obj = Object(a=1, b=b"ab", c=1, d=1, e=[1, 2], f=1.5, g=1)
    payload, text = describe(vmsd, obj)
    decoded = decode_device(parsed_description(text), payload)
    entry = next(entry for entry in decoded.fields if entry.name == name)
    entry.value = value
    if name == "f":
        assert encode_device(decoded) != payload  # 2 is a fine double
        return
    with pytest.raises(LocalStreamError, match=rf"section 'dev': field {name}"):
        encode_device(decoded)
