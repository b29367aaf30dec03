"""Versions, conditions and hooks: which fields are there, and who is called when."""

from __future__ import annotations

from typing import Any

import pytest

from migration.wire.errors import LocalStreamError, RemoteStreamError, TruncatedStreamError
from migration.wire.io import BytesReader, BytesWriter, Reader
from migration.wire.vmstate import (
    U8,
    U16,
    U32,
    Struct,
    StructArray,
    VMStateDescription,
    VStruct,
)
from tests.support.vmstate_objects import Object, device, load, save


def subsection(name: str, *fields: Any, **more: Any) -> VMStateDescription:
    """One that is needed when ``name``'s last part is an attribute."""
    attribute = name.rsplit("/", 1)[-1]
    more.setdefault("needed", lambda obj: hasattr(obj, attribute))
    return VMStateDescription(name=name, version_id=1, fields=fields or (U8(attribute),), **more)


# -- which fields are there ----------------------------------------------------------------------

GROWN = device(U8("a"), U8("b", version_id=2), U8("c", version_id=3), version_id=3)


@pytest.mark.parametrize(("version", "payload"), [(0, "01"), (1, "01"), (2, "0102"), (3, "010203")])
def test_old_versions_load_and_keep_what_they_do_not_have(version: int, payload: str) -> None:
    obj = load(GROWN, Object(b=77, c=88), bytes.fromhex(payload), version)
    assert obj.b == (2 if version >= 2 else 77)
    assert obj.c == (3 if version >= 3 else 88)


def test_newest_version_is_written() -> None:
    assert save(GROWN, Object(a=1, b=2, c=3)).hex() == "010203"


def test_a_test_alone_decides() -> None:
    """The field's version is not looked at when there is a test."""
    vmsd = device(
        U8("has_tail"),
        U16("tail", version_id=9, test=lambda obj, version: obj.has_tail == 1),
        U8("old", test=lambda obj, version: version < 2),
        version_id=2,
    )
    assert save(vmsd, Object(has_tail=1, tail=5)).hex() == "01" + "0005"
    assert save(vmsd, Object(has_tail=0)).hex() == "00"
    assert load(vmsd, Object(), bytes.fromhex("00" + "07"), 1) == Object(has_tail=0, old=7)


def test_retired_field_is_still_sent_to_those_who_want_it() -> None:
    """A property decides; the compat list of the old machine type switches it on."""
    vmsd = device(U8("a"), U32("retired", test=lambda obj, version: obj.sends_retired), U8("z"))
    assert save(vmsd, Object(a=1, z=2, sends_retired=False)).hex() == "0102"
    assert save(vmsd, Object(a=1, z=2, retired=3, sends_retired=True)).hex() == "010000000302"


@pytest.mark.parametrize(
    ("version", "reason"),
    [(4, "version 4 is newer than our 3"), (1, "version 1 is older than our oldest, 2")],
)
def test_versions_out_of_range_are_refused(version: int, reason: str) -> None:
    vmsd = device(U8("a"), version_id=3, minimum_version_id=2)
    with pytest.raises(RemoteStreamError, match=reason) as caught:
        load(vmsd, Object(), b"\x01", version)
    assert caught.value.section == "dev"


def test_versions_below_the_minimum_go_to_the_old_loader() -> None:
    """It gets no hooks, fields or subsections, but errors with section names all the same."""
    calls: list[str] = []

    def load_old(reader: Reader, obj: Any, version_id: int) -> None:
        obj.a = int.from_bytes(reader.read(2), "little") + version_id

    vmsd = device(
        U8("a"),
        version_id=5,
        minimum_version_id=4,
        minimum_version_id_old=2,
        load_state_old=load_old,
        pre_load=lambda obj: calls.append("pre"),
        post_load=lambda obj, version: calls.append("post"),
    )
    assert load(vmsd, Object(), b"\x10\x00", 2).a == 18
    assert calls == []
    assert load(vmsd, Object(), b"\x10", 4).a == 16
    assert calls == ["pre", "post"]
    with pytest.raises(RemoteStreamError, match="version 1 is older than our oldest, 2"):
        load(vmsd, Object(), b"", 1)
    with pytest.raises(TruncatedStreamError) as caught:
        load(vmsd, Object(), b"\x10", 3)
    assert caught.value.section == "dev"


def test_nested_struct_is_read_with_the_readers_own_version() -> None:
    """No version is on the wire for it: a nested description that raised its version is misread,
    silently here and by luck noticed there. So nested descriptions grow by subsections."""
    old_inner = VMStateDescription(name="inner", version_id=1, fields=(U8("a"),))
    new_inner = VMStateDescription(
        name="inner", version_id=2, fields=(U8("a"), U8("b", version_id=2))
    )
    old = device(Struct("inner", old_inner), U16("end"))
    new = device(Struct("inner", new_inner), U16("end"))
    payload = save(new, Object(inner=Object(a=1, b=2), end=0x0304))
    reader = BytesReader(payload)
    victim = Object(inner=Object(), end=0)
    old.load(reader, victim, 1)
    assert victim.end == 0x0203
    assert reader.remaining == 1  # where the footer check of the section fails
    with pytest.raises(TruncatedStreamError):
        load(new, Object(inner=Object()), save(old, Object(inner=Object(a=1), end=2)))


def test_vstruct_uses_the_version_the_parent_states() -> None:
    inner = VMStateDescription(name="inner", version_id=2, fields=(U8("a"), U8("b", version_id=2)))
    vmsd = device(VStruct("v", inner, struct_version_id=1), U8("end"))
    assert save(vmsd, Object(v=Object(a=1, b=2), end=3)).hex() == "0103"
    assert load(vmsd, Object(v=Object(b=9)), b"\x01\x03") == Object(v=Object(a=1, b=9), end=3)
    with pytest.raises(ValueError, match="inner has no version 3"):
        VStruct("v", inner, struct_version_id=3)


# -- hooks ---------------------------------------------------------------------------------------


def hooked(name: str, calls: list[str], *fields: Any, **more: Any) -> VMStateDescription:
    """A description whose every hook leaves its name."""
    return VMStateDescription(
        **{
            "name": name,
            "version_id": 1,
            "fields": fields,
            "pre_save": lambda obj: calls.append(f"pre_save {name}"),
            "post_save": lambda obj: calls.append(f"post_save {name}"),
            "pre_load": lambda obj: calls.append(f"pre_load {name}"),
            "post_load": lambda obj, version: calls.append(f"post_load {name} {version}"),
            **more,
        }
    )


def test_hooks_run_in_qemus_order() -> None:
    """Children between the parent's two hooks; a parent's post_load after all its subsections."""
    calls: list[str] = []
    inner = hooked("inner", calls, U8("a"), subsections=(hooked("inner/s", calls, U8("b")),))
    outer = hooked(
        "dev",
        calls,
        Struct("v", inner),
        subsections=(hooked("dev/s", calls, U8("c")), hooked("dev/t", calls, U8("d"))),
    )
    payload = save(outer, Object(v=Object(a=1, b=2), c=3, d=4))
    assert calls == [
        *("pre_save dev", "pre_save inner", "pre_save inner/s", "post_save inner/s"),
        *("post_save inner", "pre_save dev/s", "post_save dev/s", "pre_save dev/t"),
        *("post_save dev/t", "post_save dev"),
    ]
    calls.clear()
    load(outer, Object(v=Object()), payload)
    assert calls == [
        *("pre_load dev", "pre_load inner", "pre_load inner/s", "post_load inner/s 1"),
        *("post_load inner 1", "pre_load dev/s", "post_load dev/s 1", "pre_load dev/t"),
        *("post_load dev/t 1", "post_load dev 1"),
    ]


def test_hooks_of_an_absent_subsection_do_not_run() -> None:
    calls: list[str] = []
    sub = hooked("dev/s", calls, U8("b"), needed=lambda obj: False)
    vmsd = device(U8("a"), subsections=(sub,))
    load(vmsd, Object(), save(vmsd, Object(a=1)))
    assert calls == []


def test_pre_load_sets_what_does_not_come() -> None:
    """The documented way to give a subsection's values a default."""

    def defaults(obj: Any) -> None:
        obj.x = 42

    vmsd = device(U8("a"), pre_load=defaults, subsections=(subsection("dev/x"),))
    assert load(vmsd, Object(x=7), b"\x01").x == 42
    assert load(vmsd, Object(x=7), save(vmsd, Object(a=1, x=9))).x == 9


def failing(*args: Any) -> None:
    raise ValueError("the ring is torn")


@pytest.mark.parametrize("hook", ["pre_save", "post_save"])
def test_failing_save_hook_fails_the_save(hook: str) -> None:
    more: dict[str, Any] = {hook: failing}
    with pytest.raises(LocalStreamError, match=f"{hook} of 'dev' failed: the ring is torn"):
        save(device(U8("a"), **more), Object(a=1))


@pytest.mark.parametrize("hook", ["pre_load", "post_load"])
def test_failing_load_hook_fails_the_load(hook: str) -> None:
    more: dict[str, Any] = {hook: failing}
    inner = VMStateDescription(name="inner", fields=(U8("a"),), **more)
    with pytest.raises(RemoteStreamError, match=f"{hook} of 'inner' failed: the ring") as caught:
        load(device(U8("n"), StructArray("v", inner, count=1)), Object(v=[Object()]), b"\x01\x02")
    assert caught.value.section == "dev"
    assert "field v[0]" in caught.value.reason
    assert caught.value.offset == (1 if hook == "pre_load" else 2)
    assert isinstance(caught.value.__cause__, ValueError)


def test_post_save_runs_after_a_failed_field_but_not_after_a_failed_pre_save() -> None:
    calls: list[str] = []
    with pytest.raises(LocalStreamError, match="300"):
        save(hooked("dev", calls, U8("a")), Object(a=300))
    assert calls == ["pre_save dev", "post_save dev"]
    calls.clear()
    with pytest.raises(LocalStreamError):
        save(hooked("dev", calls, U8("a"), pre_save=failing), Object(a=1))
    assert calls == []


def test_first_error_wins_over_one_of_post_save() -> None:
    with pytest.raises(LocalStreamError, match="300 does not fit"):
        save(device(U8("a"), post_save=failing), Object(a=300))


def test_a_broken_channel_stays_an_oserror() -> None:
    class Broken(BytesWriter):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        device(U8("a")).save(Broken(), Object(a=1))
