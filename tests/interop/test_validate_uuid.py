"""Capability ``validate-uuid``: a guest does not land in a VM made for another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.interop.test_wire_qemu import CONTENTS, LOAD_AT, OPTIONS, RAM_BYTES, expected_ram, ram_of
from tests.support.pair import MIB, pair, side
from tests.support.qemu import Qemu, QemuBinary, qemu_binary

__all__ = ["qemu_binary"]

ONE = UUID("8e9c2bd5-4a13-4d3e-9b1a-6f0a3d5c7e11")
OTHER = UUID("11111111-2222-3333-4444-555555555555")


def uuid_args(uuid: UUID | None) -> tuple[str, ...]:
    return () if uuid is None else ("-uuid", str(uuid))


@pytest.mark.kernel
@pytest.mark.parametrize("postcopy", [False, True])
@pytest.mark.parametrize(
    ("there", "here", "is_taken"),
    [(ONE, ONE, True), (ONE, OTHER, False), (None, ONE, True), (ONE, None, True)],
)
def test_ours_to_ours(
    there: UUID | None, here: UUID | None, is_taken: bool, postcopy: bool, tmp_path: Path
) -> None:
    """Refused by both UUIDs, before a page; one side without one only brings a warning."""
    options: dict[str, Any] = {"ram_bytes": 8 * MIB, "uuid": there}
    with pair(postcopy=postcopy, destination={"uuid": here}, **options) as (source, target):
        source.service.set_capabilities({"validate-uuid": True})
        listening = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.machine.start()
        source.service.migrate(listening)
        if postcopy:
            source.service.start_postcopy()
        assert source.service.wait(60) == ("completed" if is_taken else "failed")
        if not is_taken:
            assert target.service.wait(60) == "failed"
            error = str(target.service.query()["error-desc"])
            assert str(ONE) in error
            assert str(OTHER) in error
            source.assert_sweep_clean()
            return
        assert target.service.wait(60) == "completed"
        warnings = [str(data["text"]) for name, data in target.events if name == "X_WARNING"]
        assert any("no UUID" in text for text in warnings) == (here is None)
        target.assert_sweep_clean()


def test_without_the_capability_nobody_asks(tmp_path: Path) -> None:
    with pair(postcopy=False, ram_bytes=8 * MIB, uuid=ONE, destination={"uuid": OTHER}) as both:
        source, target = both
        source.service.migrate(target.service.migrate_incoming(f"unix:{tmp_path}/m"))
        assert source.service.wait(60) == "completed"
        assert target.service.wait(60) == "completed"
        target.assert_sweep_clean()


@pytest.mark.interop
@pytest.mark.parametrize("theirs", [ONE, OTHER, None])
def test_ours_to_qemu(qemu_binary: QemuBinary, theirs: UUID | None) -> None:
    with side(**OPTIONS, uuid=ONE) as source:
        source.machine.ram.by_idstr("ram").write(LOAD_AT, CONTENTS)
        source.machine.start()
        with Qemu(
            qemu_binary, ram_bytes=RAM_BYTES, incoming="defer", args=uuid_args(theirs)
        ) as qemu:
            uri = f"unix:{qemu.folder}/migration"
            qemu.set_capabilities("return-path")
            qemu.execute("migrate-incoming", uri=uri)
            source.service.set_capabilities({"validate-uuid": True})
            source.service.migrate(uri)
            if theirs == OTHER:
                assert source.service.wait(60) == "failed"
                assert source.machine.run_state == "running"
                qemu.process.wait(60)
                assert str(ONE) in qemu.stderr()
            else:
                assert source.service.wait(60) == "completed", source.service.query()
                qemu.wait_status("completed")
                assert qemu.ram() == expected_ram()


@pytest.mark.interop
@pytest.mark.parametrize("ours", [ONE, OTHER, None])
def test_qemu_to_ours(qemu_binary: QemuBinary, ours: UUID | None) -> None:
    with (
        side(**OPTIONS, incoming=True, uuid=ours) as target,
        Qemu(
            qemu_binary, ram_bytes=RAM_BYTES, load={LOAD_AT: CONTENTS}, args=uuid_args(ONE)
        ) as qemu,
    ):
        uri = f"unix:{qemu.folder}/migration"
        target.service.migrate_incoming(uri)
        qemu.set_capabilities("return-path", "validate-uuid")
        qemu.execute("migrate", uri=uri)
        if ours == OTHER:
            qemu.wait_status("failed")
            assert qemu.execute("query-status")["status"] == "running"
            assert target.service.wait(60) == "failed"
            assert target.machine.run_state == "inmigrate"
        else:
            qemu.wait_status("completed")
            assert target.service.wait(60) == "completed", target.service.query()
            assert ram_of(target.machine) == expected_ram()
