"""Subsections: their bytes, their names, and what a receiver that does not know one does;
impossible declarations.
"""

from __future__ import annotations

from typing import Any

import pytest

from migration.wire.errors import RemoteStreamError, TruncatedStreamError
from migration.wire.io import BytesReader
from migration.wire.vmstate import (
    U8,
    Array,
    Struct,
    VMStateDescription,
)
from tests.support.vmstate_objects import Object, device, load, save


def subsection(name: str, *fields: Any, **more: Any) -> VMStateDescription:
    """One that is needed when ``name``'s last part is an attribute."""
    attribute = name.rsplit("/", 1)[-1]
    more.setdefault("needed", lambda obj: hasattr(obj, attribute))
    return VMStateDescription(name=name, version_id=1, fields=fields or (U8(attribute),), **more)


def failing(*args: Any) -> None:
    raise ValueError("the ring is torn")


# -- subsections ---------------------------------------------------------------------------------


def test_subsection_bytes() -> None:
    """05, length, name, be32 version, fields; nested ones inside; in declared order; only if
    needed.
    """
    deep = subsection("dev/x/deep")
    vmsd = device(
        U8("a"),
        subsections=(
            subsection("dev/x", U8("x"), subsections=(deep,)),
            subsection("dev/y"),
        ),
    )
    assert save(vmsd, Object(a=1)).hex() == "01"
    x = "05" + "05" + b"dev/x".hex() + "00000001" + "02"
    inside = "05" + "0a" + b"dev/x/deep".hex() + "00000001" + "03"
    y = "05" + "05" + b"dev/y".hex() + "00000001" + "04"
    whole = Object(a=1, x=2, deep=3, y=4)
    assert save(vmsd, whole).hex() == "01" + x + inside + y
    assert load(vmsd, Object(), bytes.fromhex("01" + x + inside + y)) == whole
    assert save(vmsd, Object(a=1, y=4)).hex() == "01" + y
    # A receiver takes them in any order.
    assert load(vmsd, Object(), bytes.fromhex("01" + y + x + inside)) == whole


def test_unknown_subsection_fails_the_load_naming_it() -> None:
    new = device(U8("a"), subsections=(subsection("dev/x"), subsection("dev/y")))
    old = device(U8("a"), subsections=(subsection("dev/x"),))
    with pytest.raises(RemoteStreamError, match="unknown subsection 'dev/y' of 'dev'") as caught:
        load(old, Object(), save(new, Object(a=1, x=2, y=3)))
    assert caught.value.offset == 1 + 12
    assert caught.value.section == "dev"
    assert load(old, Object(), save(new, Object(a=1, x=2))).x == 2


def test_subsection_of_a_newer_version_fails_the_load_naming_it() -> None:
    sub = VMStateDescription(name="dev/x", version_id=2, fields=(U8("x"),))
    mine = VMStateDescription(name="dev/x", version_id=1, fields=(U8("x"),))
    payload = save(device(U8("a"), subsections=(sub,)), Object(a=1, x=2))
    with pytest.raises(RemoteStreamError, match="dev/x version 2 is newer than our 1"):
        load(device(U8("a"), subsections=(mine,)), Object(), payload)


def test_subsection_twice_is_refused() -> None:
    vmsd = device(U8("a"), subsections=(subsection("dev/x"),))
    payload = save(vmsd, Object(a=1, x=2))
    with pytest.raises(RemoteStreamError, match="subsection 'dev/x' comes twice"):
        load(vmsd, Object(), payload + payload[1:])


def test_a_nested_struct_leaves_its_parents_subsections_to_the_parent() -> None:
    inner = VMStateDescription(name="inner", version_id=1, fields=(U8("b"),))
    vmsd = device(Struct("v", inner), subsections=(subsection("dev/x"),))
    whole = Object(v=Object(b=1), x=2)
    assert load(vmsd, Object(v=Object()), save(vmsd, whole)) == whole


def test_data_that_looks_like_a_subsection_mark_is_data() -> None:
    inner = VMStateDescription(name="inner", version_id=1, fields=(U8("b"),))
    vmsd = device(Struct("v", inner), Array("tail", 8, U8))
    for tail in ([5] * 8, [5, 6, *b"inneX/"], [5, 5, *b"inner", 0], [5, 200, 0, 0, 0, 0, 0, 0]):
        whole = Object(v=Object(b=5), tail=tail)
        assert load(vmsd, Object(v=Object()), save(vmsd, whole)) == whole


def test_subsection_may_be_named_like_qemus_pckbd_outport() -> None:
    """A name must only begin with the parent's; one that does not would never be looked for."""
    vmsd = device(U8("a"), subsections=(subsection("dev_x", U8("dev_x")),))
    assert load(vmsd, Object(), save(vmsd, Object(a=1, dev_x=2))).dev_x == 2
    for name in ("de/x", "dev"):
        with pytest.raises(ValueError, match="would not look for"):
            device(U8("a"), subsections=(subsection(name),))


@pytest.mark.parametrize("length", range(6, 13))
def test_stream_that_ends_in_a_subsection(length: int) -> None:
    vmsd = device(U8("a"), subsections=(subsection("dev/x"),))
    payload = save(vmsd, Object(a=1, x=2))
    with pytest.raises(TruncatedStreamError) as caught:
        vmsd.load(BytesReader(payload[:length], base=1000), Object(), 1)
    assert caught.value.section == "dev"
    assert 1001 <= caught.value.offset <= 1000 + length


@pytest.mark.parametrize("length", range(2, 6))
def test_too_little_of_a_name_is_left_for_the_footer_check_to_find(length: int) -> None:
    """Without the parent's whole name it could as well be data that follows."""
    vmsd = device(U8("a"), subsections=(subsection("dev/x"),))
    reader = BytesReader(save(vmsd, Object(a=1, x=2))[:length])
    vmsd.load(reader, Object(), 1)
    assert reader.remaining == length - 1


# -- declarations that cannot work ---------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "é"},
        {"name": "x" * 256},
        {"version_id": 1, "minimum_version_id": 2},
        {"version_id": -1},
        {"minimum_version_id_old": 0},
        {"load_state_old": failing},
        {"minimum_version_id": 1, "minimum_version_id_old": 2, "load_state_old": failing},
        {"subsections": (subsection("dev/x"), subsection("dev/x"))},
    ],
)
def test_impossible_description_is_refused_when_declared(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        VMStateDescription(**{"name": "dev", "version_id": 1, **wrong})


def test_nesting_is_bounded() -> None:
    """A list whose elements have a list whose elements ... can only be built by hand, but must not
    take the stack down."""
    from migration.wire.vmstate import QTailQ

    vmsd = VMStateDescription(name="node", fields=())
    object.__setattr__(vmsd, "fields", (QTailQ("kids", vmsd, new=Object),))
    object.__setattr__(vmsd, "_labels", ("kids",))
    with pytest.raises(RemoteStreamError, match="nested deeper than 64"):
        load(vmsd, Object(), b"\x01" * 1000, 0)


def test_struct_at_the_end_that_would_take_our_subsections_is_refused() -> None:
    """As QEMU's two descriptions called pckbd do it: the subsections belong to the inner one."""
    inner = VMStateDescription(name="dev", version_id=1, fields=(U8("b"),))
    with pytest.raises(ValueError, match="'dev', the last field, would take 'dev/x'"):
        device(Struct("v", inner), subsections=(subsection("dev/x"),))
    device(Struct("v", inner), U8("c"), subsections=(subsection("dev/x"),))
