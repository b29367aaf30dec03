"""A stock QEMU judges the wire: our RAM-only machine goes to ``-M none`` and comes back from
one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migration.toyvm.machine import ToyMachine
from tests.support.pair import Side, side
from tests.support.qemu import MIB, PAGE_BYTES, Qemu, QemuBinary, pattern, qemu_binary

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop

RAM_BYTES = 8 * MIB
LOAD_AT = 0x40000
CONTENTS = pattern(700, seed="8", zero_every=5)
OPTIONS = {"machine_type": "none", "ram_bytes": RAM_BYTES, "smp": 0, "fill_share": 0.0}


def ram_of(machine: ToyMachine) -> bytes:
    return machine.ram.by_idstr("ram").read(0, RAM_BYTES)


def expected_ram() -> bytes:
    return bytes(LOAD_AT) + CONTENTS + bytes(RAM_BYTES - LOAD_AT - len(CONTENTS))


@pytest.fixture
def ours() -> Iterator[Side]:
    """Our source with the pattern in its RAM, running."""
    with side(**OPTIONS) as source:
        source.machine.ram.by_idstr("ram").write(LOAD_AT, CONTENTS)
        source.machine.start()
        yield source


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_ours_to_qemu(ours: Side, qemu_binary: QemuBinary, mode: str) -> None:
    """QEMU says completed and its guest runs; RAM is ours, byte for byte."""
    with Qemu(qemu_binary, ram_bytes=RAM_BYTES, incoming="defer") as qemu:
        uri = f"unix:{qemu.folder}/migration"
        qemu.set_capabilities("postcopy-ram" if mode == "postcopy" else "return-path")
        qemu.execute("migrate-incoming", uri=uri)
        ours.service.set_capabilities({"postcopy-ram": mode == "postcopy"})
        if mode == "postcopy":
            ours.service.set_parameters({"x-hold-background": True, "max-bandwidth": 100_000})
        ours.service.migrate(uri)
        if mode == "postcopy":
            ours.service.start_postcopy()
            qemu.qmp.wait_event("RESUME")
            asked = LOAD_AT + 300 * PAGE_BYTES
            assert qemu.read_ram(asked, PAGE_BYTES) == CONTENTS[300 * PAGE_BYTES : 301 * PAGE_BYTES]
            ours.service.set_parameters({"x-hold-background": False})
        assert ours.service.wait(60) == "completed", ours.service.query()
        qemu.wait_status("completed")
        assert qemu.ram() == expected_ram()
        assert qemu.execute("query-status")["status"] == "running"
        assert ours.machine.run_state == "postmigrate"
        figures = ours.service.query()["x-postcopy"]
        assert isinstance(figures, dict)
        assert figures["features"] == []
        if mode == "postcopy":
            ram = ours.service.query()["ram"]
            assert isinstance(ram, dict)
            assert ram["postcopy-requests"] >= 1


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_qemu_to_ours(qemu_binary: QemuBinary, mode: str) -> None:
    """The other way: QEMU says completed, our machine runs with QEMU's RAM."""
    with (
        side(**OPTIONS, incoming=True) as target,
        Qemu(qemu_binary, ram_bytes=RAM_BYTES, load={LOAD_AT: CONTENTS}) as qemu,
    ):
        uri = f"unix:{qemu.folder}/migration"
        target.service.set_capabilities({"postcopy-ram": mode == "postcopy"})
        target.service.migrate_incoming(uri)
        qemu.set_capabilities("postcopy-ram" if mode == "postcopy" else "return-path")
        if mode == "postcopy":
            qemu.set_parameters(max_bandwidth=300_000, max_postcopy_bandwidth=60_000)
        qemu.execute("migrate", uri=uri)
        if mode == "postcopy":
            qemu.execute("migrate-start-postcopy")
            target.wait_event("RESUME")
            last = LOAD_AT + len(CONTENTS) - PAGE_BYTES
            block = target.machine.ram.by_idstr("ram")
            assert block.read(last, PAGE_BYTES) == CONTENTS[-PAGE_BYTES:]
            qemu.set_parameters(max_postcopy_bandwidth=0)
        qemu.wait_status("completed")
        assert target.service.wait(60) == "completed", target.service.query()
        assert ram_of(target.machine) == expected_ram()
        assert target.machine.run_state == "running"
        if mode == "postcopy":
            assert target.figures["page-requests"] >= 1
            assert qemu.query_migrate()["ram"]["postcopy-requests"] >= 1
