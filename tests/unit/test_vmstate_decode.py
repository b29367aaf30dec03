"""Decoding with descriptions of every QEMU's making, hostile ones too, and encoding what was
changed.
"""

from __future__ import annotations

from typing import Any

import pytest

from migration.analyze.devices import struct_to_json
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
    Array,
    Bitmap,
    Buffer,
    CpuDouble,
    Timer,
    VMStateDescription,
)
from tests.support.vmstate_objects import (
    Object,
    describe,
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


def test_last_element_as_10_0_describes_it() -> None:
    """Elements one by one, the last without its index: it is an element all the same."""
    element = {"name": "p", "type": "struct", "struct": POINT_DESCRIBED, "size": 3}
    description = described(
        {"name": "n", "type": "uint8", "size": 1},
        {**element, "index": 0},
        {**element, "index": 1},
        element,
        {"name": "end", "type": "uint8", "size": 1},
    )
    payload = b"\x03" + b"\x01\x00\x02" * 2 + b"\x05\x00\x06" + b"\x07"
    decoded = decode_device(description, payload)
    assert [entry.index for entry in decoded.fields] == [None, 0, 1, 2, None]
    values = decoded.state["p"]
    assert isinstance(values, list)
    assert [value["x"] for value in values if isinstance(value, DecodedStruct)] == [1, 1, 5]
    assert [path for path, _ in decoded.walk() if path.endswith(".x")] == [
        "p[0].x",
        "p[1].x",
        "p[2].x",
    ]
    shown = struct_to_json(decoded.state)
    assert shown["p"] == [{"x": 1, "y": 2}, {"x": 1, "y": 2}, {"x": 5, "y": 6}]
    assert encode_device(decoded) == payload


def test_runs_of_one_name_are_one_list() -> None:
    """As newer QEMUs describe pointers with nulls between them."""
    runs = [
        {"name": "q", "array_len": 2, "type": "uint8", "size": 1},
        {"name": "q", "type": "nullptr", "size": 1},
        {"name": "q", "array_len": 2, "type": "uint8", "size": 1},
    ]
    decoded = decode_device(described(*runs), b"\x01\x020\x03\x04")
    assert struct_to_json(decoded.state) == {"q": [1, 2, None, 3, 4]}
    assert encode_device(decoded) == b"\x01\x020\x03\x04"


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
