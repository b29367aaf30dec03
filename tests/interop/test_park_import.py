"""Snapshot files that a stock QEMU wrote become parked VMs, and run again lazily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.guest_hops import (
    Verb,
    block_file,
    manifest_of,
    nothing_left,
    same_memory,
    unpark,
)
from tests.support.guest_image import layout_for
from tests.support.guest_vm import BLOCK, GuestOptions, GuestVM
from tests.support.need import need
from tests.support.qemu import MIB, QemuBinary, newer_qemu, qemu_binary

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop

OPTIONS = GuestOptions(layout_for(32 * MIB))


@contextmanager
def source_vm(binary: QemuBinary, options: GuestOptions = OPTIONS) -> Iterator[GuestVM]:
    with GuestVM(binary, options) as vm:
        vm.serial.wait_passes(2)
        if binary.version < (9, 0):
            vm.execute("stop")
        yield vm


def import_file(file: str, directory: Path) -> dict[str, object]:
    with Verb("park", file, str(directory)) as verb:
        result = verb.succeed()
        assert "warning" not in verb.said
    manifest = manifest_of(directory)
    assert (manifest["origin"], manifest["state"]) == ("file", "parked")
    return result


def bring_back(directory: Path, binary: QemuBinary, options: GuestOptions = OPTIONS) -> None:
    with GuestVM(binary, options, incoming="defer") as vm:
        unpark(directory, vm, "unix")
        vm.assert_runs_clean()


@pytest.mark.parametrize("ram_mib", [32, 1024])
def test_a_stream_caught_by_a_command(
    qemu_binary: QemuBinary, tmp_path: Path, ram_mib: int
) -> None:
    """``exec:cat > FILE``, the snapshot every QEMU can write."""
    file, options = tmp_path / "snapshot", GuestOptions(layout_for(ram_mib * MIB))
    with source_vm(qemu_binary, options) as vm:
        vm.set_capabilities()
        vm.set_parameters(max_bandwidth=1 << 32, downtime_limit=2000)
        vm.execute("migrate", uri=f"exec:cat >{file}")
        vm.wait_status("completed")
        import_file(str(file), tmp_path / "vm")
        same_memory(vm, block_file(tmp_path / "vm", BLOCK))
    bring_back(tmp_path / "vm", qemu_binary, options)


def newer() -> QemuBinary:
    binary = newer_qemu()
    need(binary, "no QEMU 10.0 unpacked here: `make qemu-10` does it where there is a mirror")
    assert binary is not None
    return binary


@pytest.mark.parametrize("offset", [0, 0x3000], ids=["whole", "offset"])
@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "mapped-ram"])
@pytest.mark.parametrize("ram_mib", [32, 1024])
def test_a_file_migration(tmp_path: Path, mapped: bool, offset: int, ram_mib: int) -> None:
    """``file:`` of newer QEMUs, with pages at fixed places or as a stream; also inside a file."""
    binary, options = newer(), GuestOptions(layout_for(ram_mib * MIB))
    file, directory = tmp_path / "snapshot", tmp_path / "vm"
    place = f",offset={offset:#x}" if offset else ""
    with source_vm(binary, options) as vm:
        vm.set_capabilities(*(["mapped-ram"] if mapped else []))
        vm.set_parameters(max_bandwidth=1 << 32, downtime_limit=2000)
        vm.execute("migrate", uri=f"file:{file}{place}")
        vm.wait_status("completed")
        import_file(f"{file}{place}", directory)
        same_memory(vm, block_file(directory, BLOCK))
    if mapped:
        # What was a hole is one again: the guest's pages are about 30 MiB of it.
        used = sum(each.stat().st_blocks * 512 for each in directory.iterdir())
        assert used < 64 * MIB
    bring_back(directory, binary, options)


def test_a_file_written_by_several_threads(tmp_path: Path) -> None:
    """mapped-ram with multifd: the same layout, pages written by its channels."""
    binary, options = newer(), GuestOptions(layout_for(1024 * MIB))
    file, directory = tmp_path / "snapshot", tmp_path / "vm"
    with source_vm(binary, options) as vm:
        vm.set_capabilities("mapped-ram", "multifd")
        vm.set_parameters(multifd_channels=4, max_bandwidth=1 << 32, downtime_limit=2000)
        vm.execute("migrate", uri=f"file:{file}")
        vm.wait_status("completed")
        import_file(str(file), directory)
        same_memory(vm, block_file(directory, BLOCK))
    bring_back(directory, binary, options)


@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "mapped-ram"])
def test_a_file_cut_short_leaves_nothing(tmp_path: Path, mapped: bool) -> None:
    binary = newer()
    file = tmp_path / "in" / "snapshot"
    file.parent.mkdir()
    with source_vm(binary) as vm:
        vm.set_capabilities(*(["mapped-ram"] if mapped else []))
        vm.execute("migrate", uri=f"file:{file}")
        vm.wait_status("completed")
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 1000)
    target = tmp_path / "out" / "vm"
    target.parent.mkdir()
    with Verb("park", str(file), str(target)) as verb:
        verb.fail("ends" if mapped else "ended")
    nothing_left(target)


def test_no_snapshot_at_all(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("nothing of the kind, but long enough to be read as one\n")
    with Verb("park", str(file), str(tmp_path / "vm")) as verb:
        verb.fail("not acceptable")
    with Verb("park", str(tmp_path / "nobody"), str(tmp_path / "vm")) as verb:
        verb.fail("No such file")


def test_usage(tmp_path: Path) -> None:
    with Verb("park", str(tmp_path / "vm")) as verb:
        verb.fail("give --listen URI and a directory, or a snapshot FILE")
    assert verb.process.returncode == 2
