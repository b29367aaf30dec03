"""Whole precopies with each dirty tracker: a guest and a device that write all the time, several
passes, and the oracle's sweep at the destination. A write that a tracker misses is a stale page
there."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestmem import Backing, Bitmap, KvmRingTracker
from migration.toyvm import ToyMachine, ToyOptions, TrackerChoice, VCpuKind
from migration.toyvm.tracking import choose_tracker
from tests.support.pair import MIB, pair
from tests.support.toyvm_kvm import need_kvm
from tests.support.toyvm_machines import run_some

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

THREAD, KVM = VCpuKind.THREAD, VCpuKind.KVM
ANON, MEMFD, HUGETLB = Backing.ANON, Backing.MEMFD, Backing.HUGETLB
COMBINATIONS = [
    (THREAD, ANON, "auto", "wp-async"),
    (THREAD, ANON, "wp-sync", "wp-sync"),
    (THREAD, MEMFD, "wp-sync", "wp-sync"),
    (THREAD, HUGETLB, "wp-sync", "wp-sync"),
    (KVM, ANON, "auto", "kvm-log"),
    (KVM, ANON, "wp-async", "wp-async"),
    (KVM, MEMFD, "wp-sync", "wp-sync"),
    (KVM, ANON, "kvm-ring", "kvm-ring"),
    (KVM, HUGETLB, "kvm-ring", "kvm-ring"),
]


@pytest.mark.parametrize(("vcpu", "backing", "choice", "kind"), COMBINATIONS)
def test_nothing_written_during_precopy_is_lost(
    vcpu: VCpuKind, backing: Backing, choice: str, kind: str, tmp_path: Path
) -> None:
    if vcpu is KVM:
        need_kvm()
    tracker = TrackerChoice(choice)
    with pair(
        postcopy=False, ram_bytes=8 * MIB, backing=backing, vcpu=vcpu, dirty_tracker=tracker
    ) as (source, target):
        # Slow enough that the guest certainly writes during each pass: it cannot end by itself.
        source.service.set_parameters({"downtime-limit": 0, "max-bandwidth": 24 * MIB})
        listening = target.service.migrate_incoming(f"unix:{tmp_path}/migration")
        source.machine.start()
        source.service.migrate(listening)
        source.wait_event("MIGRATION_PASS", **{"pass": 4})
        assert source.figures["dirty-tracker"] == kind
        # The last pass takes what there is, however much: this guest never stops writing.
        source.service.set_parameters({"downtime-limit": 100_000})
        assert source.service.wait(60) == "completed", source.service.query()
        assert target.service.wait(60) == "completed", target.service.query()
        assert source.machine.vcpu_statistics()[0].writes > 0
        target.assert_sweep_clean()


def test_a_vcpu_empties_its_full_ring_itself() -> None:
    """More pages than the ring has entries between two syncs: the vCPU goes on without the
    collector, and all of its pages are reported."""
    need_kvm()
    options = ToyOptions(
        ram_bytes=16 * MIB, vcpu=KVM, dirty_ring_size=1024, write_share=1.0, ring_pages=0
    )
    with ToyMachine(options) as machine:
        tracker = choose_tracker(TrackerChoice.AUTO, machine.ram, machine.kvm)
        assert isinstance(tracker, KvmRingTracker)
        tracker.start()
        run_some(machine, 4 * machine.ram.total_length // MIB * 256)
        assert tracker.full_exits > 0
        found = {block.idstr: Bitmap(block.page_count) for block in machine.ram}
        # Four random touches a page on the average leave one in fifty out.
        assert tracker.sync(found) > machine.ram.total_length // MIB * 256 // 2
        tracker.stop()
        assert machine.sweep().is_clean
