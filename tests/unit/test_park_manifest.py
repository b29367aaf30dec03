"""The manifest and the files beside it: what is written, what is believed, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from migration.park.give_back import GiveOptions, Giving
from migration.park.manifest import (
    Manifest,
    ParkedState,
    ParkError,
    change_state,
    count_clone,
    hold_guest,
    load,
)
from migration.park.sections import OpaqueSection
from migration.park.store import ParkWriter, checksum, data_extents
from migration.wire.ram_setup import RamSetup, RamSetupBlock

PAGE = 4096
SECTIONS = [OpaqueSection("timer", 0, 2, b"\x01" * 24), OpaqueSection("fdc", 0, 2, b"\x02" * 7)]


def write_vm(directory: Path, *, in_memory: bool = False) -> Manifest:
    """A small parked VM: one block of 16 pages, two of them with data."""
    writer = ParkWriter(directory, in_memory=in_memory)
    writer.add_blocks(RamSetup((RamSetupBlock("ram", 16 * PAGE),)))
    for page in (3, 9):
        os.pwrite(writer.blocks[0].fd, bytes([page]) * PAGE, page * PAGE)
    return writer.finish(
        machine="none", uuid=None, sections=SECTIONS, origin="precopy", peer="unix:x"
    )


@pytest.mark.parametrize("in_memory", [False, True])
def test_round_trip(tmp_path: Path, in_memory: bool) -> None:
    written = write_vm(tmp_path / "vm", in_memory=in_memory)
    manifest = load(tmp_path / "vm")
    assert manifest == written
    assert manifest.state is ParkedState.PARKED
    assert manifest.block_devices == ("fdc",)
    assert [device.idstr for device in manifest.devices] == ["timer", "fdc"]
    assert os.listdir(tmp_path) == ["vm"]
    with open(tmp_path / "vm" / "ram-0.bin", "rb") as file:
        extents = list(data_extents(file.fileno(), 16 * PAGE))
        assert extents == [(3 * PAGE, 4 * PAGE), (9 * PAGE, 10 * PAGE)]
        assert os.pread(file.fileno(), PAGE, 9 * PAGE) == b"\x09" * PAGE


def test_states_are_on_disk_with_their_reason(tmp_path: Path) -> None:
    write_vm(tmp_path / "vm")
    change_state(tmp_path / "vm", ParkedState.GIVING, "a test", features=3)
    again = load(tmp_path / "vm")
    assert (again.state, again.features) == (ParkedState.GIVING, 3)
    assert again.history[-1] == "giving: a test"


def test_a_clone_that_ends_late_does_not_bring_the_guest_back(tmp_path: Path) -> None:
    """It notes itself in the manifest as it is now, not as it was when the clone began."""
    write_vm(tmp_path / "vm")
    change_state(tmp_path / "vm", ParkedState.GIVEN, "to somebody")
    count_clone(tmp_path / "vm", "to somebody else")
    again = load(tmp_path / "vm")
    assert (again.state, again.clones) == (ParkedState.GIVEN, 1)
    assert len(again.history) == 3


def test_two_cannot_give_the_same_guest(tmp_path: Path) -> None:
    """Both would find it parked. Clones may be given meanwhile, and the next when one is done."""
    write_vm(tmp_path / "vm")

    def give(*, is_clone: bool = False) -> Giving:
        options = GiveOptions(page_sizes={}, is_clone=is_clone, force=True)
        return Giving(tmp_path / "vm", options, lambda event, data: None)

    one = give()
    with pytest.raises(ParkError, match="another process is giving"):
        give()
    give(is_clone=True).close()
    one.close()
    os.close(hold_guest(tmp_path / "vm"))
    give().close()


def test_checksum_does_not_see_holes(tmp_path: Path) -> None:
    """A copy that lost its sparseness is the same; a page moved or changed is not."""
    manifest = write_vm(tmp_path / "vm")
    path = tmp_path / "vm" / "ram-0.bin"
    data = path.read_bytes()
    dense = tmp_path / "dense"
    dense.write_bytes(data)
    with open(dense, "r+b") as file:
        assert checksum(file.fileno(), 16 * PAGE) == manifest.blocks[0].crc32c
        os.pwrite(file.fileno(), data[3 * PAGE : 4 * PAGE], 4 * PAGE)
        os.pwrite(file.fileno(), bytes(PAGE), 3 * PAGE)
        assert checksum(file.fileno(), 16 * PAGE) != manifest.blocks[0].crc32c


def edit(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format 2"),
        ({"state": "lost"}, "damaged"),
        ({"machine_": "x"}, "damaged"),
        ({"uuid": "no uuid"}, "damaged"),
        ({"blocks": [["ram", 1]]}, "damaged"),
        (
            {"blocks": [{"idstr": "ram", "used_length": 65536, "page_size": 4096,
                         "file": "../../etc/passwd", "crc32c": 0}]},
            "lies in",
        ),
        (
            {"blocks": [{"idstr": "ram", "used_length": 1 << 20, "page_size": 4096,
                         "file": "ram-0.bin", "crc32c": 0}]},
            "65536 bytes, the manifest says",
        ),
        (
            {"devices": [{"idstr": "timer", "instance_id": 0, "version_id": 2, "offset": 30,
                          "length": 30}]},
            "devices.bin has 31 bytes",
        ),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_add_up(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    write_vm(tmp_path / "vm")
    edit(tmp_path / "vm", **changes)
    with pytest.raises(ParkError, match=words):
        load(tmp_path / "vm")


def test_no_parked_vm(tmp_path: Path) -> None:
    with pytest.raises(ParkError, match="no parked VM"):
        load(tmp_path)


def test_an_existing_directory_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    with pytest.raises(ParkError, match="exists already"):
        ParkWriter(tmp_path / "vm")


def test_one_made_meanwhile_is_not_written_over_either(tmp_path: Path) -> None:
    writer = ParkWriter(tmp_path / "vm")
    writer.add_blocks(RamSetup(()))
    (tmp_path / "vm").mkdir()
    with pytest.raises(FileExistsError):
        writer.finish(machine="none", uuid=None, sections=[], origin="precopy", peer="x")
    writer.discard()
    assert os.listdir(tmp_path) == ["vm"]
    assert os.listdir(tmp_path / "vm") == []
