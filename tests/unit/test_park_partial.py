"""A VM half here: found again, locked, forgotten when nobody can go on with it."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import pytest

from migration.park.keeper import Package
from migration.park.manifest import ParkError
from migration.park.partial import PACKAGE, find_package, load_package, partials
from migration.park.sections import OpaqueSection
from migration.park.store import ParkWriter
from migration.wire.extension import Feature
from migration.wire.headers import Configuration
from migration.wire.ram_setup import RamSetup, RamSetupBlock

PACKED = Package(
    Configuration("pc-i440fx-7.2", uuid=uuid.UUID(int=7)),
    (OpaqueSection("timer", 0, 2, b"ticks"), OpaqueSection("cpu", 1, 12, b"")),
    ram_section_id=2,
    features=Feature.CHECKSUM,
)


def begun(directory: Path) -> ParkWriter:
    writer = ParkWriter(directory)
    writer.add_blocks(RamSetup((RamSetupBlock("pc.ram", 8192, 2 << 20),)))
    return writer


def test_a_package_is_found_again(tmp_path: Path) -> None:
    writer = begun(tmp_path / "vm")
    assert not writer.is_resumable
    writer.keep_package(PACKED)
    assert writer.is_resumable
    os.pwrite(writer.blocks[0].fd, b"old", 0)
    writer.close()
    work = find_package(tmp_path / "vm")
    package, blocks = load_package(work)
    assert package == PACKED
    assert [(b.idstr, b.used_length, b.page_size) for b in blocks] == [("pc.ram", 8192, 2 << 20)]
    again = ParkWriter.reopen(tmp_path / "vm", work, blocks)
    # Which pages were whole nobody knows: all are forgotten.
    assert os.pread(again.blocks[0].fd, 8192, 0) == bytes(8192)
    again.finish(
        machine="x", uuid=None, sections=list(package.sections), origin="postcopy", peer="y"
    )
    assert os.listdir(tmp_path) == ["vm"]
    assert PACKAGE not in os.listdir(tmp_path / "vm")


def test_only_one_process_goes_on_with_it(tmp_path: Path) -> None:
    writer = begun(tmp_path / "vm")
    writer.keep_package(PACKED)
    _, blocks = load_package(writer.work)
    with pytest.raises(ParkError, match="another process"):
        ParkWriter.reopen(tmp_path / "vm", writer.work, blocks)
    writer.discard()


def test_leftovers_go_with_the_next_park(tmp_path: Path) -> None:
    """Not those that are in use, and not those a guest hangs on."""
    dead, in_use, kept = (begun(tmp_path / "vm") for _ in range(3))
    kept.keep_package(PACKED)
    kept.close()
    dead.close()
    writer = ParkWriter(tmp_path / "vm")
    assert set(partials(tmp_path / "vm")) == {in_use.work, kept.work, writer.work}
    for each in (in_use, writer):
        each.discard()


def test_nothing_or_too_much_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ParkError, match="nothing to resume"):
        find_package(tmp_path / "vm")
    for _ in range(2):
        writer = begun(tmp_path / "vm")
        writer.keep_package(PACKED)
        writer.close()
    with pytest.raises(ParkError, match="several"):
        find_package(tmp_path / "vm")


@pytest.mark.parametrize(
    "change",
    [{"format": 9}, {"kind": "x"}, {"devices_crc32c": 1}, {"blocks": [["a", 1, 1, "../b"]]}],
)
def test_a_damaged_package_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    writer = begun(tmp_path / "vm")
    writer.keep_package(PACKED)
    writer.close()
    path = writer.work / PACKAGE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ParkError, match="cannot be gone on with"):
        load_package(writer.work)
