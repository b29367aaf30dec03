"""Capability ``switchover-ack``: a running guest is not stopped before the destination allows
it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.test_wire_qemu import (
    CONTENTS,
    LOAD_AT,
    OPTIONS,
    RAM_BYTES,
    expected_ram,
    ours,
    ram_of,
)
from tests.support.pair import MIB, Side, pair, side
from tests.support.qemu import Qemu, QemuBinary, qemu_binary

__all__ = ["ours", "qemu_binary"]


def need_ack(binary: QemuBinary) -> None:
    if binary.version < (8, 1):
        pytest.skip(f"{binary.name} has no switchover-ack (QEMU 8.1)")


@pytest.mark.kernel
@pytest.mark.parametrize("postcopy", [False, True])
def test_ours_to_ours(postcopy: bool, tmp_path: Path) -> None:
    with pair(postcopy=postcopy, ram_bytes=8 * MIB) as (source, target):
        for each in (source, target):
            each.service.set_capabilities({"switchover-ack": True})
        source.machine.start()
        source.service.migrate(target.service.migrate_incoming(f"unix:{tmp_path}/m"))
        if postcopy:
            source.service.start_postcopy()
        assert source.service.wait(60) == "completed", source.service.query()
        assert target.service.wait(60) == "completed", target.service.query()
        target.assert_sweep_clean()


@pytest.mark.kernel
@pytest.mark.parametrize("postcopy", [False, True])
def test_a_source_that_is_not_allowed(postcopy: bool, tmp_path: Path) -> None:
    """The guest runs on, in ever more rounds; a cancel leaves it whole, and stopped it may go."""
    with pair(postcopy=postcopy, ram_bytes=8 * MIB, rate=20_000) as (source, target):
        source.service.set_capabilities({"switchover-ack": True})  # nobody says it over there
        source.machine.start()
        listening = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(listening)
        if postcopy:
            source.service.start_postcopy()
        source.wait_event("MIGRATION_PASS", **{"pass": 5})
        assert source.statuses[-1] == "active"
        assert source.machine.run_state == "running"
        source.service.stop_guest()
        assert source.service.wait(60) == "completed", source.service.query()
        assert target.service.wait(60) == "completed", target.service.query()
        target.assert_sweep_clean()


@pytest.mark.kernel
def test_allowed_it_still_waits_for_the_user(tmp_path: Path) -> None:
    """The destination's word is not that of ``migrate-continue``."""
    with pair(postcopy=False, ram_bytes=8 * MIB) as (source, target):
        for each in (source, target):
            each.service.set_capabilities({"switchover-ack": True})
        source.service.set_capabilities({"pause-before-switchover": True})
        source.machine.start()
        source.service.migrate(target.service.migrate_incoming(f"unix:{tmp_path}/m"))
        source.wait_event("MIGRATION", status="pre-switchover")
        assert source.service.wait(0.5) == "pre-switchover"  # as long as nobody says so
        source.service.continue_("pre-switchover")
        assert source.service.wait(60) == "completed", source.service.query()
        assert target.service.wait(60) == "completed", target.service.query()
        target.assert_sweep_clean()


@pytest.mark.kernel
def test_cancelled_while_it_waits(tmp_path: Path) -> None:
    with pair(postcopy=False, ram_bytes=8 * MIB, rate=20_000) as (source, target):
        source.service.set_capabilities({"switchover-ack": True})
        source.machine.start()
        source.service.migrate(target.service.migrate_incoming(f"unix:{tmp_path}/m"))
        source.wait_event("MIGRATION_PASS", **{"pass": 3})
        source.service.cancel()
        assert source.service.wait(60) == "cancelled"
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


@pytest.mark.interop
@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_ours_to_qemu(ours: Side, qemu_binary: QemuBinary, mode: str) -> None:
    need_ack(qemu_binary)
    with Qemu(qemu_binary, ram_bytes=RAM_BYTES, incoming="defer") as qemu:
        uri = f"unix:{qemu.folder}/migration"
        also = ("postcopy-ram",) if mode == "postcopy" else ()
        qemu.set_capabilities("return-path", "switchover-ack", *also)
        qemu.execute("migrate-incoming", uri=uri)
        ours.service.set_capabilities(dict.fromkeys(("switchover-ack", *also), True))
        ours.service.migrate(uri)
        if mode == "postcopy":
            ours.service.start_postcopy()
        assert ours.service.wait(60) == "completed", ours.service.query()
        qemu.wait_status("completed")
        assert qemu.ram() == expected_ram()


@pytest.mark.interop
@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_qemu_to_ours(qemu_binary: QemuBinary, mode: str) -> None:
    need_ack(qemu_binary)
    also = ("postcopy-ram",) if mode == "postcopy" else ()
    with (
        side(**OPTIONS, incoming=True) as target,
        Qemu(qemu_binary, ram_bytes=RAM_BYTES, load={LOAD_AT: CONTENTS}) as qemu,
    ):
        uri = f"unix:{qemu.folder}/migration"
        target.service.set_capabilities(dict.fromkeys(("switchover-ack", *also), True))
        target.service.migrate_incoming(uri)
        qemu.set_capabilities("return-path", "switchover-ack", *also)
        qemu.execute("migrate", uri=uri)
        if mode == "postcopy":
            qemu.execute("migrate-start-postcopy")
        qemu.wait_status("completed")
        assert target.service.wait(60) == "completed", target.service.query()
        assert ram_of(target.machine) == expected_ram()
