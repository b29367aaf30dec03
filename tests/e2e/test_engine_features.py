"""Capabilities that change how a migration converges, ends, or what it leaves behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.interop.test_wire_qemu import OPTIONS, RAM_BYTES
from tests.support.pair import MIB, Side, pair, side
from tests.support.qemu import Qemu, QemuBinary, qemu_binary

__all__ = ["qemu_binary"]

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]


def ram_of(side_: Side) -> dict[str, Any]:
    info = side_.service.query()["ram"]
    assert isinstance(info, dict)
    return info


def begin(source: Side, target: Side, folder: Path) -> None:
    listening = target.service.migrate_incoming(f"unix:{folder}/migration")
    source.machine.start()
    source.service.migrate(listening)


def finish(source: Side, target: Side) -> None:
    assert source.service.wait(60) == "completed", source.service.query()
    assert target.service.wait(60) == "completed", target.service.query()
    target.assert_sweep_clean()


def test_xbzrle_sends_differences(tmp_path: Path) -> None:
    """Pages written again go out as what changed in them, and arrive whole."""
    with pair(postcopy=False, ram_bytes=16 * MIB, rate=20_000, ring_pages=0) as (source, target):
        source.service.set_capabilities({"xbzrle": True})
        source.service.set_parameters({"downtime-limit": 0, "max-bandwidth": 200 * MIB})
        begin(source, target, tmp_path)
        for passes in (2, 3, 4):
            source.wait_event("MIGRATION_PASS", **{"pass": passes})
        cache = source.service.query()["xbzrle-cache"]
        assert isinstance(cache, dict)
        assert cache["pages"] > 0, cache
        assert cache["encoding-rate"] > 2
        source.service.set_parameters({"downtime-limit": 2000})
        finish(source, target)


def test_xbzrle_to_a_stock_qemu(qemu_binary: QemuBinary, tmp_path: Path) -> None:
    """QEMU decodes our differences: bytes rewritten between the passes arrive."""
    with (
        side(**OPTIONS) as source,
        Qemu(qemu_binary, ram_bytes=RAM_BYTES, incoming="defer") as qemu,
    ):
        block = source.machine.ram.by_idstr("ram")
        block.write(0, bytes(range(256)) * (RAM_BYTES // 256))
        source.machine.start()
        uri = f"unix:{qemu.folder}/migration"
        qemu.set_capabilities("return-path", "xbzrle")
        qemu.execute("migrate-incoming", uri=uri)
        source.service.set_capabilities({"xbzrle": True, "pause-before-switchover": True})
        source.service.set_parameters({"downtime-limit": 0, "max-bandwidth": 4 * MIB})
        source.service.migrate(uri)
        rewritten = 0
        while ram_of(source)["dirty-sync-count"] < 4:
            block.write(64 * (rewritten % (RAM_BYTES // 64)), rewritten.to_bytes(8, "little"))
            rewritten += 61
        source.service.set_parameters({"downtime-limit": 2000, "max-bandwidth": 0})
        source.wait_status("pre-switchover")
        source.service.continue_("pre-switchover")
        assert source.service.wait(60) == "completed", source.service.query()
        qemu.wait_status("completed")
        assert qemu.ram() == block.read(0, RAM_BYTES)
        cache = source.service.query()["xbzrle-cache"]
        assert isinstance(cache, dict)
        assert cache["pages"] > 0, cache


def test_auto_converge_slows_the_guest(tmp_path: Path) -> None:
    """A guest that dirties faster than the link is throttled more and more, and freed by cancel."""
    with pair(postcopy=False, ram_bytes=16 * MIB, write_share=1.0) as (source, target):
        source.service.set_capabilities({"auto-converge": True})
        source.service.set_parameters({"downtime-limit": 1, "max-bandwidth": 32 * MIB})
        begin(source, target, tmp_path)
        seen: list[int] = []
        until = time.monotonic() + 60
        while len(seen) < 2 and time.monotonic() < until:
            percent = source.service.query().get("cpu-throttle-percentage")
            if isinstance(percent, int) and percent not in seen:
                seen.append(percent)
        assert seen == [20, 30]
        source.service.cancel()
        assert source.service.wait(30) == "cancelled"
        assert "cpu-throttle-percentage" not in source.service.query()
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


@pytest.mark.parametrize("postcopy", [False, True])
def test_pause_before_switchover(postcopy: bool, tmp_path: Path) -> None:
    """The guest stands still until the word is given; a cancel at that point starts it again."""
    with pair(postcopy=postcopy, ram_bytes=8 * MIB, rate=500) as (source, target):
        source.service.set_capabilities({"pause-before-switchover": True})
        begin(source, target, tmp_path)
        if postcopy:
            source.service.start_postcopy()
        source.wait_status("pre-switchover")
        assert source.machine.run_state == "finish-migrate"
        source.service.continue_("pre-switchover")
        finish(source, target)


def test_cancel_at_the_pause_gives_the_guest_back(tmp_path: Path) -> None:
    with pair(ram_bytes=8 * MIB, rate=500) as (source, target):
        source.service.set_capabilities({"pause-before-switchover": True})
        begin(source, target, tmp_path)
        source.wait_status("pre-switchover")
        source.service.cancel()
        assert source.service.wait(30) == "cancelled"
        assert source.machine.run_state == "running"
        target.wait_status("failed")
        source.assert_sweep_clean()


def test_release_ram_gives_memory_back_and_rules_recovery_out(tmp_path: Path) -> None:
    """Pages sent in postcopy are dropped at the source; after that there is nothing to recover
    from."""
    with pair(ram_bytes=16 * MIB, rate=500) as (source, target):
        source.service.set_capabilities({"release-ram": True})
        source.service.set_parameters({"max-bandwidth": MIB})
        begin(source, target, tmp_path)
        source.service.start_postcopy()
        finish(source, target)
        populated = sum(block.populated().count() for block in source.machine.ram)
        assert populated == 0


def test_blocktime_is_counted(tmp_path: Path) -> None:
    """QEMU's fields, per vCPU and in sum, when the capability is on."""
    with pair(ram_bytes=16 * MIB, rate=3000, smp=2) as (source, target):
        target.service.set_capabilities({"postcopy-blocktime": True})
        source.service.set_parameters({"max-bandwidth": MIB, "max-postcopy-bandwidth": 8 * MIB})
        begin(source, target, tmp_path)
        source.service.start_postcopy()
        finish(source, target)
        info = target.service.query()
        vcpus = info["postcopy-vcpu-blocktime"]
        assert isinstance(vcpus, list)
        assert len(vcpus) == 2
        assert isinstance(info["postcopy-vcpu-latency"], list)
        assert all(latency > 0 for latency in info["postcopy-vcpu-latency"])
        dist = info["postcopy-latency-dist"]
        assert isinstance(dist, list)
        assert len(dist) == 24
        assert sum(dist) > 0
