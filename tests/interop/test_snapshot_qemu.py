"""Snapshots to and from a stock QEMU: plain streams in a file, and the mapped-ram layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migration.runtime.errors import MigrationError
from migration.runtime.snapshots.look import MappedSnapshot
from tests.support.need import need
from tests.support.pair import Side, side
from tests.support.qemu import (
    MIB,
    PAGE_BYTES,
    Qemu,
    QemuBinary,
    newer_qemu,
    pattern,
    qemu_binary,
)

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

__all__ = ["qemu_binary"]

_RAM = 4 * MIB
_PATTERN = pattern(_RAM // PAGE_BYTES)


@contextmanager
def _ours(*, incoming: bool = False, filled: bool = True) -> Iterator[Side]:
    """QEMU's machine ``none`` as a toy, its RAM filled with the pattern."""
    with side(machine_type="none", smp=0, ram_bytes=_RAM, incoming=incoming) as one:
        if filled and not incoming:
            one.machine.ram.by_idstr("ram").write(0, _PATTERN)
        yield one


def _ram(one: Side) -> bytes:
    return one.machine.ram.by_idstr("ram").read(0, _RAM)


@pytest.fixture
def mapped_qemu() -> QemuBinary:
    """A QEMU that knows mapped-ram (9.0 and newer)."""
    binary = newer_qemu()
    need(binary, "no QEMU with mapped-ram: `make qemu-10` unpacks one where there is a mirror")
    assert binary is not None
    return binary


def test_qemu_loads_our_snapshot(tmp_path: Path, qemu_binary: QemuBinary) -> None:
    """As a stream through a command, and where it can from the file itself."""
    path = tmp_path / "snapshot"
    with _ours() as one:
        one.service.cont()
        one.service.savevm(f"file:{path}")
    uris = [f"exec:cat {path}"]
    if qemu_binary.version >= (8, 2):
        uris.append(f"file:{path}")
    for uri in uris:
        with Qemu(qemu_binary, ram_bytes=_RAM, incoming="defer") as qemu:
            qemu.set_capabilities()
            qemu.execute("migrate-incoming", uri=uri)
            qemu.wait_status("completed")
            assert qemu.ram() == _PATTERN
            assert qemu.execute("query-status")["status"] == "running"


@pytest.mark.parametrize("way", ["loadvm", "exec", "file"])
def test_we_load_what_a_qemu_saved(tmp_path: Path, qemu_binary: QemuBinary, way: str) -> None:
    """``migrate "exec:cat > f"``; a machine that has another guest, and one that waits for one."""
    path = tmp_path / "saved"
    with Qemu(qemu_binary, ram_bytes=_RAM, load={0: _PATTERN}) as qemu:
        qemu.set_capabilities()
        qemu.execute("migrate", uri=f"exec:cat > {path}")
        qemu.wait_status("completed")
    with _ours(incoming=way != "loadvm", filled=False) as one:
        if way == "loadvm":
            one.machine.ram.by_idstr("ram").fill(0, _RAM, 0x55)
            one.service.loadvm(f"file:{path}")
            assert one.machine.run_state == "paused"  # it was not running here
        else:
            one.service.migrate_incoming(f"exec:cat {path}" if way == "exec" else f"file:{path}")
            assert one.service.wait(60) == "completed"
            assert one.machine.run_state == "running"
        assert _ram(one) == _PATTERN


@pytest.mark.parametrize("offset", [0, 0x3000, 5000])
def test_qemu_loads_our_mapped_ram_file(
    tmp_path: Path, mapped_qemu: QemuBinary, offset: int
) -> None:
    """From where it lies; positions in it count from the start of the file, as in QEMU's own."""
    path = tmp_path / "snapshot"
    uri = f"file:{path},offset={offset}"
    with _ours() as one:
        one.service.set_capabilities({"mapped-ram": True})
        one.service.savevm(uri)
    with Qemu(mapped_qemu, ram_bytes=_RAM, incoming="defer") as qemu:
        qemu.set_capabilities("mapped-ram")
        qemu.execute("migrate-incoming", uri=uri)
        qemu.wait_status("completed")
        assert qemu.ram() == _PATTERN


@pytest.mark.parametrize("capabilities", [("mapped-ram",), ("mapped-ram", "multifd")])
@pytest.mark.parametrize("offset", [0, 0x3000])
def test_we_load_qemus_mapped_ram_file(
    tmp_path: Path, mapped_qemu: QemuBinary, offset: int, capabilities: tuple[str, ...]
) -> None:
    """Written by one thread or several: by ``loadvm``, ``migrate-incoming``, and page by page."""
    path = tmp_path / "saved"
    uri = f"file:{path},offset={offset}"
    with Qemu(mapped_qemu, ram_bytes=_RAM, load={0: _PATTERN}) as qemu:
        qemu.set_capabilities(*capabilities)
        qemu.execute("migrate", uri=uri)
        qemu.wait_status("completed")
    with MappedSnapshot(path, offset=offset) as snapshot:
        assert snapshot.read("ram", 0, _RAM) == _PATTERN
    with _ours(filled=False) as one:
        one.machine.ram.by_idstr("ram").fill(0, _RAM, 0x55)
        one.service.loadvm(uri)
        assert _ram(one) == _PATTERN
    with _ours(incoming=True) as one:
        one.service.set_capabilities({"mapped-ram": True})
        one.service.migrate_incoming(uri)
        assert one.service.wait(60) == "completed"
        assert _ram(one) == _PATTERN


def test_qemu_and_we_refuse_each_others_other_layout(
    tmp_path: Path, mapped_qemu: QemuBinary
) -> None:
    """The capability must be the same on both sides; who has it off says which it is."""
    path = tmp_path / "mapped"
    with _ours() as one:
        one.service.set_capabilities({"mapped-ram": True})
        one.service.savevm(f"file:{path}")
    with Qemu(mapped_qemu, ram_bytes=_RAM, incoming="defer") as qemu:
        qemu.set_capabilities()
        qemu.execute("migrate-incoming", uri=f"file:{path}", exit_on_error=False)
        qemu.wait_status("failed")
        assert "mapped-ram" in qemu.stderr() + str(qemu.query_migrate())


def test_a_snapshot_of_a_machine_with_devices_is_not_loaded_into_one_without(
    tmp_path: Path, qemu_binary: QemuBinary
) -> None:
    """A pc's stream: by its machine type, before anything changes."""
    path = tmp_path / "pc"
    with Qemu(qemu_binary, ram_bytes=8 * MIB, machine="pc", args=["-S"]) as qemu:
        qemu.set_capabilities()
        qemu.execute("migrate", uri=f"exec:cat > {path}")
        qemu.wait_status("completed")
    with _ours() as one:
        with pytest.raises(MigrationError, match="machine type of the snapshot is 'pc-i440fx"):
            one.service.loadvm(f"file:{path}")
        assert _ram(one) == _PATTERN
        assert one.machine.run_state == "prelaunch"
