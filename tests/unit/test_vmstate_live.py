"""Live handlers: a small disk sent in rounds while somebody writes to it."""

from __future__ import annotations

import pytest

from migration.wire.constants import SectionType
from migration.wire.errors import RemoteStreamError, StreamError
from migration.wire.headers import (
    SectionHeader,
    check_footer,
    read_section_header,
    read_section_type,
)
from migration.wire.io import BytesReader, BytesWriter, Reader, Writer
from migration.wire.registry import StateRegistry
from migration.wire.vmstate import U8, LiveStateHandler, PendingEstimate, VMStateDescription
from tests.support.vmstate_objects import Object

BLOCK = 16
_END = 0xFFFF
FRAME = 5  # a PART header in front of the payload


class Disk:
    """Blocks by number; a record is be16 number and the block, 0xffff ends a section's list."""

    def __init__(self, idstr: str, blocks: int, *, postcopy: bool = False) -> None:
        self.idstr = idstr
        self.instance_id = 0
        self.version_id = 2
        self.minimum_version_id = 1
        self.has_postcopy = postcopy
        self.blocks = [bytes(BLOCK)] * blocks
        self.dirty = set(range(blocks))
        self.active = True
        self.calls: list[str] = []

    def write(self, number: int, data: bytes) -> None:
        self.blocks[number] = data.ljust(BLOCK, b"\0")
        self.dirty.add(number)

    def is_active(self) -> bool:
        return self.active

    def save_setup(self, writer: Writer) -> None:
        self.calls.append("setup")
        writer.write(len(self.blocks).to_bytes(2, "big") + _END.to_bytes(2, "big"))

    def save_iterate(self, writer: Writer, budget_bytes: int) -> bool:
        self._send(writer, max(1, budget_bytes // (BLOCK + 2)))
        return not self.dirty

    def pending(self, *, exact: bool) -> PendingEstimate:
        size = len(self.dirty) * BLOCK
        return PendingEstimate(postcopy_bytes=size) if self.has_postcopy else PendingEstimate(size)

    def save_complete(self, writer: Writer) -> None:
        self.calls.append("complete")
        self._send(writer, len(self.blocks))

    def save_cleanup(self) -> None:
        self.calls.append("cleanup")

    def load_setup(self) -> None:
        self.calls.append("load setup")

    def load(self, reader: Reader, version_id: int) -> None:
        number = int.from_bytes(reader.read(2), "big")
        if number == len(self.blocks) and "started" not in self.calls:
            self.calls.append("started")
            number = int.from_bytes(reader.read(2), "big")
        while number != _END:
            if number >= len(self.blocks):
                reason = f"block {number} of {len(self.blocks)}"
                raise RemoteStreamError(reason, offset=reader.position - 2, section=self.idstr)
            self.blocks[number] = reader.read(BLOCK)
            number = int.from_bytes(reader.read(2), "big")

    def load_cleanup(self) -> None:
        self.calls.append("load cleanup")

    def _send(self, writer: Writer, most: int) -> None:
        for number in sorted(self.dirty)[:most]:
            writer.write(number.to_bytes(2, "big") + self.blocks[number])
            self.dirty.remove(number)
        writer.write(_END.to_bytes(2, "big"))


def receive(registry: StateRegistry, data: bytes) -> list[tuple[str, str]]:
    """Load every section; returns (type, name) of each."""
    reader, started = BytesReader(data), dict[int, SectionHeader]()
    seen = []
    while reader.remaining:
        header = read_section_header(reader, read_section_type(reader), started)
        if header.type is SectionType.FULL:
            registry.load_full_section(reader, header, with_footer=True)
        else:
            registry.load_live_section(reader, header, with_footer=True)
        seen.append((header.type.name, header.idstr))
    return seen


def machine(*disks: Disk) -> StateRegistry:
    registry = StateRegistry()
    for disk in disks:
        registry.register_live(disk)
    return registry


def test_a_disk_satisfies_the_protocol() -> None:
    assert isinstance(Disk("disk", 1), LiveStateHandler)


def test_disk_arrives_whole_although_written_to_on_the_way() -> None:
    source, destination = Disk("disk", 40), Disk("disk", 40)
    registry = machine(source)
    registry.register(VMStateDescription(name="dev", version_id=1, fields=(U8("a"),)), Object(a=1))
    other = machine(destination)
    other.register(VMStateDescription(name="dev", version_id=1, fields=(U8("a"),)), Object(a=0))
    writer = BytesWriter()
    registry.save_live_setup(writer)
    rounds = 0
    while not registry.save_live_iterate(writer, 10 * (BLOCK + 2)):
        source.write(rounds % 40, b"round %d" % rounds)
        rounds += 1
        if rounds == 20:
            break
    assert registry.pending_live(exact=True).precopy_bytes == len(source.dirty) * BLOCK
    source.write(39, b"the last write")
    registry.save_live_complete(writer)
    registry.save_full_sections(writer)
    registry.save_live_cleanup()
    other.load_live_setup()
    seen = receive(other, writer.getvalue())
    other.load_live_cleanup()
    assert destination.blocks == source.blocks
    assert seen[0] == ("START", "disk")
    assert {kind for kind, _ in seen[1:-2]} == {"PART"}
    assert seen[-2:] == [("END", "disk"), ("FULL", "dev")]
    assert source.calls == ["setup", "complete", "cleanup"]
    assert destination.calls == ["load setup", "started", "load cleanup"]


def test_budget_is_for_all_handlers_and_the_first_comes_first() -> None:
    first, second = Disk("first", 10), Disk("second", 10)
    registry = machine(first, second)
    registry.save_live_setup(BytesWriter())
    assert not registry.save_live_iterate(BytesWriter(), FRAME + 4 * (BLOCK + 2))
    assert (len(first.dirty), len(second.dirty)) == (6, 10)
    assert not registry.save_live_iterate(BytesWriter(), 9 * (BLOCK + 2))
    assert len(first.dirty) == 0
    assert 6 <= len(second.dirty) <= 9
    assert registry.save_live_iterate(BytesWriter(), 1 << 20)
    assert registry.pending_live(exact=False) == PendingEstimate(0, 0)


def test_least_budget_still_makes_progress() -> None:
    disk = Disk("disk", 2)
    registry = machine(disk)
    registry.save_live_setup(BytesWriter())
    assert not registry.save_live_iterate(BytesWriter(), 0)
    assert len(disk.dirty) == 1


def test_postcopy_completes_the_others_first() -> None:
    """What cannot follow the guest is complete before the switchover."""
    ram, disk = Disk("ram", 3, postcopy=True), Disk("disk", 3)
    registry = machine(ram, disk)
    writer = BytesWriter()
    registry.save_live_setup(writer)
    assert registry.pending_live(exact=True) == PendingEstimate(3 * BLOCK, 3 * BLOCK)
    assert registry.pending_live(exact=True).total_bytes == 6 * BLOCK
    registry.save_live_complete(writer, postcopy=False)
    assert (ram.calls, disk.calls) == (["setup"], ["setup", "complete"])
    registry.save_live_complete(writer, postcopy=True)
    assert ram.calls == ["setup", "complete"]
    seen = receive(machine(Disk("ram", 3), Disk("disk", 3)), writer.getvalue())
    assert seen[-2:] == [("END", "disk"), ("END", "ram")]


def test_inactive_handler_takes_no_part() -> None:
    disk = Disk("disk", 3)
    disk.active = False
    registry = machine(disk)
    writer = BytesWriter()
    registry.save_live_setup(writer)
    assert registry.save_live_iterate(writer, 100)
    registry.save_live_complete(writer)
    registry.save_live_cleanup()
    assert writer.getvalue() == b""
    assert disk.calls == []


def test_every_handler_is_cleaned_up_even_if_setup_or_cleanup_fails() -> None:
    class Failing(Disk):
        def save_setup(self, writer: Writer) -> None:
            raise StreamError("no memory")

        def save_cleanup(self) -> None:
            super().save_cleanup()
            raise StreamError("cannot clean up")

    first, second, third = Disk("first", 1), Failing("second", 1), Disk("third", 1)
    registry = machine(first, second, third)
    with pytest.raises(StreamError, match="no memory"):
        registry.save_live_setup(BytesWriter())
    with pytest.raises(StreamError, match="cannot clean up"):
        registry.save_live_cleanup()
    assert first.calls == ["setup", "cleanup"]
    assert second.calls == ["cleanup"]
    assert third.calls == []
    registry.save_live_cleanup()
    assert second.calls == ["cleanup"]


def test_sections_of_the_wrong_kind_are_refused() -> None:
    registry = machine(Disk("disk", 1))
    registry.register(VMStateDescription(name="dev", version_id=1), Object())
    full = SectionHeader(SectionType.FULL, 0, "disk", 0, 2)
    with pytest.raises(RemoteStreamError, match="a FULL section for state that comes in rounds"):
        registry.load_full_section(BytesReader(b""), full)
    start = SectionHeader(SectionType.START, 0, "dev", 0, 1)
    with pytest.raises(RemoteStreamError, match="a START section for state that comes whole"):
        registry.load_live_section(BytesReader(b""), start)
    newer = SectionHeader(SectionType.START, 0, "disk", 0, 3)
    with pytest.raises(RemoteStreamError, match="version 3 is newer than our 2"):
        registry.load_live_section(BytesReader(b""), newer)


def test_live_sections_have_footers_when_wanted() -> None:
    registry = machine(Disk("disk", 1))
    writer, bare = BytesWriter(), BytesWriter()
    registry.save_live_setup(writer)
    registry.save_live_setup(bare, with_footers=False)
    assert writer.getvalue()[:-5] == bare.getvalue()
    reader = BytesReader(writer.getvalue()[-5:])
    check_footer(reader, SectionHeader(SectionType.START, 0, "disk", 0, 2))
