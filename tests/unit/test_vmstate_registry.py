"""Sections in a stream: order, ids, names, old-style functions, blockers, and what a loader
refuses.
"""

from __future__ import annotations

import json

import pytest

from migration.wire.constants import SectionType
from migration.wire.errors import LocalStreamError, RemoteStreamError, TruncatedStreamError
from migration.wire.headers import SectionHeader, read_section_header, read_section_type
from migration.wire.io import BytesReader, BytesWriter, Reader, Writer
from migration.wire.registry import StateRegistry
from migration.wire.vmstate import U8, U32, MigrationPriority, VMStateDescription
from tests.support.vmstate_objects import Object


def description(name: str, **more: object) -> VMStateDescription:
    fields = {"name": name, "version_id": 1, "fields": (U8("a"),), **more}
    return VMStateDescription(**fields)  # type: ignore[arg-type]


def header(
    idstr: str, instance_id: int = 0, version_id: int = 1, kind: SectionType = SectionType.FULL
) -> SectionHeader:
    return SectionHeader(kind, 7, idstr, instance_id, version_id)


def headers_of(data: bytes, payload_bytes: int) -> list[SectionHeader]:
    """The headers of sections whose payloads all have that length."""
    reader = BytesReader(data)
    found = []
    while reader.remaining:
        found.append(read_section_header(reader, read_section_type(reader), {}))
        reader.read(payload_bytes + 5)
    return found


def test_section_bytes() -> None:
    registry = StateRegistry()
    registry.register(description("dev", version_id=3), Object(a=0x11))
    writer = BytesWriter()
    saved = registry.save_full_sections(writer, 9)
    assert writer.getvalue().hex() == (
        "04" + "00000009" + "03" + b"dev".hex() + "00000000" + "00000003" + "11" + "7e" + "00000009"
    )
    assert saved.next_section_id == 10
    bare = BytesWriter()
    registry.save_full_sections(bare, 9, with_footers=False)
    assert bare.getvalue() == writer.getvalue()[:-5]


def test_order_is_by_priority_then_by_registration() -> None:
    registry = StateRegistry()
    registry.register(description("first"), Object(a=1))
    registry.register(description("bridge", priority=MigrationPriority.PCI_BUS), Object(a=2))
    registry.register_legacy("old", None, 1, save=lambda w: w.write(b"x"), load=lambda r, v: None)
    registry.register(description("iommu", priority=MigrationPriority.IOMMU), Object(a=3))
    registry.register(description("last"), Object(a=4))
    writer = BytesWriter()
    registry.save_full_sections(writer)
    found = headers_of(writer.getvalue(), 1)
    assert [(each.idstr, each.section_id) for each in found] == [
        *(("bridge", 1), ("iommu", 3), ("first", 0), ("old", 2), ("last", 4)),
    ]


def test_unneeded_device_is_left_out() -> None:
    registry = StateRegistry()
    registry.register(description("no", needed=lambda obj: obj.a > 1), Object(a=1))
    registry.register(description("yes", needed=lambda obj: obj.a > 1), Object(a=2))
    writer = BytesWriter()
    saved = registry.save_full_sections(writer, 0)
    assert [each.idstr for each in headers_of(writer.getvalue(), 1)] == ["yes"]
    assert saved.next_section_id == 1
    assert [json.loads(device)["name"] for device in saved.devices] == ["yes"]


def test_unmigratable_device_blocks_with_its_name() -> None:
    registry = StateRegistry()
    registry.register(description("fine"), Object(a=1))
    entry = registry.register(description("passthrough", unmigratable=True), Object(a=1))
    registry.register(description("other", unmigratable=True), Object(a=1), path="0000:00:05.0")
    assert registry.blockers() == ["passthrough", "0000:00:05.0/other"]
    writer = BytesWriter()
    with pytest.raises(LocalStreamError, match=r"passthrough, 0000:00:05\.0/other"):
        registry.save_full_sections(writer)
    assert writer.getvalue() == b""
    registry.unregister(entry)
    assert registry.blockers() == ["0000:00:05.0/other"]


def test_instance_ids_count_up_per_name() -> None:
    registry = StateRegistry()
    vmsd, other = description("dma"), description("rtc")
    got = [registry.register(each, Object(a=1)).instance_id for each in (vmsd, other, vmsd, vmsd)]
    assert got == [0, 0, 1, 2]
    assert registry.register(vmsd, Object(a=1), 9).instance_id == 9
    assert registry.register(vmsd, Object(a=1)).instance_id == 10
    with pytest.raises(ValueError, match="'dma' instance 9 is registered already"):
        registry.register(vmsd, Object(a=1), 9)


def test_device_on_a_bus_answers_to_its_bare_name_too() -> None:
    """Old sources sent the bare name with an instance count of its own."""
    registry = StateRegistry()
    vmsd = description("nic")
    first, second = Object(a=0), Object(a=0)
    one = registry.register(vmsd, first, path="0000:00:03.0")
    two = registry.register(vmsd, second, path="0000:00:04.0")
    assert (one.idstr, one.instance_id) == ("0000:00:03.0/nic", 0)
    assert (two.idstr, two.instance_id) == ("0000:00:04.0/nic", 0)
    registry.load_full_section(BytesReader(b"\x05"), header("nic", 1))
    assert (first.a, second.a) == (0, 5)
    registry.load_full_section(BytesReader(b"\x06"), header("0000:00:03.0/nic"))
    assert (first.a, second.a) == (6, 5)


def test_aliases_and_real_names() -> None:
    """A real name wins over somebody else's alias."""
    registry = StateRegistry()
    renamed, real = Object(a=0), Object(a=0)
    registry.register(description("new"), renamed, aliases=[("old", 0), ("older", 3)])
    registry.register(description("old"), real, 0)
    registry.register(description("numbered"), Object(a=0), 2, alias_id=0)
    registry.load_full_section(BytesReader(b"\x01"), header("old"))
    assert (renamed.a, real.a) == (0, 1)
    registry.load_full_section(BytesReader(b"\x02"), header("older", 3))
    assert renamed.a == 2
    found = registry.find("numbered", 0)
    assert found is not None
    assert found.instance_id == 2


def test_loader_refuses_what_is_not_there() -> None:
    registry = StateRegistry()
    registry.register(description("dev", version_id=3, minimum_version_id=2), Object(a=0))
    cases = [
        (header("who"), "unknown section 'who' instance 0"),
        (header("dev", 1), "unknown section 'dev' instance 1"),
        (header("dev", 0, 4), "version 4 is newer than our 3"),
        (header("dev", 0, 1), "version 1 is older than our oldest, 2"),
    ]
    for each, reason in cases:
        with pytest.raises(RemoteStreamError, match=reason) as caught:
            registry.load_full_section(BytesReader(b"\x01", base=77), each)
        assert caught.value.offset == 77
        assert caught.value.section == each.idstr


def test_footer_is_checked_when_asked_for() -> None:
    registry = StateRegistry()
    registry.register(description("dev"), Object(a=0))
    good = b"\x01\x7e\x00\x00\x00\x07"
    registry.load_full_section(BytesReader(good), header("dev"), with_footer=True)
    with pytest.raises(RemoteStreamError, match="where the section footer should be"):
        registry.load_full_section(BytesReader(b"\x01" + good), header("dev"), with_footer=True)
    wrong = good[:-1] + b"\x08"
    with pytest.raises(RemoteStreamError, match="footer of section id 8, not 7"):
        registry.load_full_section(BytesReader(wrong), header("dev"), with_footer=True)


def test_error_names_the_section_as_sent_not_the_description() -> None:
    registry = StateRegistry()
    registry.register(description("nic"), Object(a=0), path="0000:00:03.0")
    with pytest.raises(TruncatedStreamError) as caught:
        registry.load_full_section(BytesReader(b"", base=5), header("0000:00:03.0/nic"))
    assert caught.value.section == "0000:00:03.0/nic"
    assert "field a" in caught.value.reason


# -- old-style functions -------------------------------------------------------------------------


def test_old_style_section_travels_beside_a_device() -> None:
    """Same stream, and described by nothing but its length."""
    received: list[tuple[bytes, int]] = []

    def save_old(writer: Writer) -> None:
        writer.write(b"hello")
        assert writer.position > 5

    def load_old(reader: Reader, version_id: int) -> None:
        received.append((reader.read(5), version_id))

    registry = StateRegistry()
    registry.register(description("dev"), Object(a=1))
    registry.register_legacy("old", None, 4, save=save_old, load=load_old, minimum_version_id=3)
    writer = BytesWriter()
    saved = registry.save_full_sections(writer, 0)
    assert json.loads(saved.devices[1]) == {
        "name": "old",
        "instance_id": 0,
        "size": 5,
        "fields": [{"name": "data", "size": 5, "type": "buffer"}],
    }
    reader = BytesReader(writer.getvalue())
    for _ in range(2):
        each = read_section_header(reader, read_section_type(reader), {})
        registry.load_full_section(reader, each, with_footer=True)
    assert received == [(b"hello", 4)]
    assert reader.remaining == 0
    with pytest.raises(RemoteStreamError, match="version 2 is older than our oldest, 3"):
        registry.load_full_section(BytesReader(b""), header("old", 0, 2))


def test_old_style_failures_are_typed() -> None:
    def broken(*args: object) -> None:
        raise KeyError("gone")

    registry = StateRegistry()
    registry.register_legacy("old", None, 1, save=broken, load=broken)
    registry.register_legacy(
        "short", None, 1, save=lambda w: None, load=lambda r, v: (r.read(9), None)[1]
    )
    with pytest.raises(LocalStreamError, match=r"section 'old'.*old-style save failed: 'gone'"):
        registry.save_full_sections(BytesWriter())
    with pytest.raises(RemoteStreamError, match="old-style load failed: 'gone'") as caught:
        registry.load_full_section(BytesReader(b"", base=3), header("old"))
    assert (caught.value.section, caught.value.offset) == ("old", 3)
    with pytest.raises(TruncatedStreamError) as truncated:
        registry.load_full_section(BytesReader(b"123"), header("short"))
    assert truncated.value.section == "short"


def test_description_of_the_whole_stream() -> None:
    registry = StateRegistry()
    with pytest.raises(LocalStreamError, match="nothing to describe"):
        registry.vmdesc_json(page_size=4096)
    registry.register(VMStateDescription(name="dev", version_id=2, fields=(U32("a"),)), Object(a=1))
    registry.save_full_sections(BytesWriter(), 0)
    assert registry.vmdesc_json(page_size=4096) == (
        b'{"page_size": 4096, "devices": [{"name": "dev", "instance_id": 0, "vmsd_name": "dev",'
        b' "version": 2, "fields": [{"name": "a", "type": "uint32", "size": 4}]}]}'
    )
    saved = registry.save_full_sections(BytesWriter(), 0, describe=False)
    assert saved.devices == ()


def test_names_that_do_not_fit_a_header_are_refused() -> None:
    registry = StateRegistry()
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        registry.register(description("x" * 200), Object(a=1), path="y" * 60)
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        registry.register_legacy("", None, 1, save=lambda w: None, load=lambda r, v: None)
    assert len(registry) == 0
