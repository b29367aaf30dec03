"""vCPUs and missing pages on the real kernel: asleep, kicked, resumed, poisoned, timed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestmem import TARGET_PAGE_BYTES as PAGE
from guestmem import Backing
from migration.toyvm import Damage, ToyMachine, ToyOptions, VCpuKind, Workload
from migration.toyvm._native import lib
from tests.support.guestmem_memory import more_hugepages
from tests.support.leaks import leaked, snapshot
from tests.support.toyvm_kvm import need_kvm
from tests.support.toyvm_machines import (
    MissingRam,
    copy_ram,
    missing_ram,
    run_some,
    until,
)

pytestmark = pytest.mark.kernel

RAM = 1 << 20


def _options(**changes: object) -> ToyOptions:
    base: dict[str, object] = {
        "ram_bytes": RAM,
        "ring_pages": 0,
        "workload": Workload.SEQUENTIAL,
        "write_share": 1.0,
    }
    return ToyOptions(**{**base, **changes})  # type: ignore[arg-type]


@pytest.fixture(params=[VCpuKind.THREAD, VCpuKind.KVM])
def kind(request: pytest.FixtureRequest) -> VCpuKind:
    if request.param is VCpuKind.KVM:
        need_kvm()
    return VCpuKind(request.param)


@pytest.fixture
def source() -> Iterator[ToyMachine]:
    with ToyMachine(_options()) as machine:
        yield machine


@pytest.fixture
def missing(source: ToyMachine, kind: VCpuKind) -> Iterator[MissingRam]:
    with ToyMachine(_options(vcpu=kind)) as machine, missing_ram(machine, source) as ram:
        machine.attach_received(ram.received)
        yield ram


def _asleep(missing: MissingRam) -> int:
    """Let the guest run into its next missing page; the address it sleeps at."""
    missing.machine.start()
    return missing.wait_fault()


def test_a_guest_asleep_on_a_missing_page_is_stopped_at_once(missing: MissingRam) -> None:
    machine = missing.machine
    assert _asleep(missing) == machine.ram.by_idstr("toy.ram").host
    machine.stop()
    statistics = machine.vcpu_statistics()[0]
    assert (statistics.ops, statistics.status, statistics.is_running) == (0, "ready", False)


def test_an_operation_given_up_is_done_once_after_all(missing: MissingRam) -> None:
    """Stop in a fault, place the page while stopped, go on: each page was written exactly once."""
    machine = missing.machine
    for page in range(8):
        address = _asleep(missing)
        machine.stop()
        assert machine.vcpu_statistics()[0].ops == page
        missing.place(address)
    _asleep(missing)
    machine.stop()
    assert machine.vcpu_statistics()[0].ops == 8
    log = memoryview(bytes(machine.aux.log(0))).cast("I").tolist()
    assert log == [1] * 8 + [0] * (len(log) - 8)
    missing.place_rest()
    assert machine.sweep().is_clean


def test_stopping_and_starting_in_the_same_fault_again_and_again(missing: MissingRam) -> None:
    machine = missing.machine
    address = _asleep(missing)
    for _ in range(20):
        machine.stop()
        assert machine.vcpu_statistics()[0].ops == 0
        assert _asleep(missing) == address
    missing.place(address)
    until(lambda: machine.vcpu_statistics()[0].ops == 1, "the operation")


def test_touches_of_missing_pages_are_timed_and_hits_counted_apart(missing: MissingRam) -> None:
    machine = missing.machine
    machine.start()
    pages = RAM // PAGE
    for _ in range(pages):
        missing.place(missing.wait_fault())
    until(lambda: machine.vcpu_statistics()[0].hits > 0, "a second round")
    machine.stop()
    statistics = machine.vcpu_statistics()[0]
    assert statistics.misses == statistics.latency.count == pages
    assert statistics.ops == statistics.misses + statistics.hits
    summary = statistics.latency.summary_us()
    assert 0 < summary["p50"] <= summary["p90"] <= summary["p99"] <= summary["max"]
    machine.attach_received(None)
    before = statistics.ops
    run_some(machine, 100)
    after = machine.vcpu_statistics()[0]
    assert after.ops > before
    # A KVM vCPU may have been parked in an operation whose bitmap it had already looked at.
    assert after.hits - statistics.hits <= 1
    assert after.misses == statistics.misses
    assert machine.sweep().is_clean


def test_detaching_while_a_vcpu_sleeps_does_not_wait_for_the_page(missing: MissingRam) -> None:
    address = _asleep(missing)
    missing.machine.attach_received(None)
    assert missing.wait_fault() == address
    missing.place(address)
    until(lambda: missing.machine.vcpu_statistics()[0].ops >= 1, "the operation")


def test_a_poisoned_page_parks_the_vcpu_with_its_address(missing: MissingRam) -> None:
    machine = missing.machine
    address = _asleep(missing)
    missing.poison(address)
    until(lambda: machine.vcpu_statistics()[0].status == "lost page", "the park")
    until(lambda: not machine.vcpu_statistics()[0].is_running, "the park")
    statistics = machine.vcpu_statistics()[0]
    assert statistics.lost_address & -PAGE == address
    assert statistics.ops == 0
    assert machine.statistics()["lost_vcpus"] == 1
    machine.stop()
    page = (address - machine.ram.by_idstr("toy.ram").host) // PAGE
    for number in range(RAM // PAGE):
        if number != page:
            missing.place(machine.ram.by_idstr("toy.ram").host + number * PAGE)
    report = machine.sweep()
    assert [(bad.page, bad.damage) for bad in report.bad] == [(page, Damage.LOST)]
    assert report.pages_checked == RAM // PAGE


def test_a_lost_page_that_comes_back_lets_the_vcpu_go_on(missing: MissingRam) -> None:
    machine = missing.machine
    address = _asleep(missing)
    missing.poison(address)
    until(lambda: not machine.vcpu_statistics()[0].is_running, "the park")
    machine.stop()
    missing.place(address)
    machine.start()
    until(lambda: machine.vcpu_statistics()[0].ops == 1, "the operation")
    assert machine.vcpu_statistics()[0].status == "ready"


def test_the_downtime_ends_with_the_first_operation_not_the_start(missing: MissingRam) -> None:
    machine = missing.machine
    address = _asleep(missing)
    assert machine.vcpu_statistics()[0].first_op_ns == 0
    missing.place(address)
    until(lambda: machine.vcpu_statistics()[0].first_op_ns, "the first operation")


@pytest.mark.parametrize("backing", [Backing.MEMFD, Backing.HUGETLB])
def test_faults_on_shared_and_huge_pages(backing: Backing, kind: VCpuKind, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        if backing is Backing.HUGETLB:
            stack.enter_context(more_hugepages(4, tmp_path / "journal"))
        options = _options(ram_bytes=4 << 20, backing=backing, vcpu=kind)
        source = stack.enter_context(ToyMachine(_options(ram_bytes=4 << 20)))
        machine = stack.enter_context(ToyMachine(options))
        missing = stack.enter_context(missing_ram(machine, source))
        machine.attach_received(missing.received)
        address = _asleep(missing)
        machine.stop()
        assert machine.vcpu_statistics()[0].ops == 0
        missing.place(address)
        while missing.received["toy.ram"].count() < (4 << 20) // PAGE:
            address = _asleep(missing)
            machine.stop()
            missing.place(address)
        run_some(machine, 5000)
        assert machine.sweep().is_clean


def test_the_ring_thread_is_kicked_like_a_vcpu() -> None:
    options = _options(smp=0, ring_pages=64)
    with (
        ToyMachine(options) as source,
        ToyMachine(options) as machine,
        missing_ram(machine, source) as missing,
    ):
        ring = machine.devices.ring
        assert ring is not None
        for page in range(3):
            address = _asleep(missing)
            machine.stop()
            assert ring.head == page * 128
            missing.place(address)
        machine.start()
        missing.poison(missing.wait_fault())
        until(lambda: ring.is_lost, "the ring's park")
        machine.stop()
        assert ring.head == 3 * 128


@pytest.mark.parametrize("smp", [1, 4])
@pytest.mark.parametrize("workload", list(Workload))
def test_every_workload_keeps_its_own_pages_right(
    workload: Workload, smp: int, kind: VCpuKind
) -> None:
    options = _options(
        workload=workload, smp=smp, vcpu=kind, ram_bytes=2 << 20, ring_pages=64, write_share=0.5
    )
    with ToyMachine(options) as machine:
        run_some(machine, 2000)
        run_some(machine, 2000)
        report = machine.sweep()
        assert report.is_clean, report.bad
        for vcpu in machine.vcpu_statistics():
            assert vcpu.errors == 0
            log = memoryview(bytes(machine.aux.log(vcpu.index))).cast("I").tolist()
            assert sum(log) == vcpu.writes
            assert 0 < vcpu.writes < vcpu.ops


def test_a_rate_is_kept_and_can_be_lifted(kind: VCpuKind) -> None:
    with ToyMachine(_options(rate=2, vcpu=kind)) as machine:
        machine.start()
        until(lambda: machine.vcpu_statistics()[0].ops >= 1, "one operation")
        # Two a second: a thousand more cannot be explained by waiting.
        assert machine.vcpu_statistics()[0].ops < 1000
        machine.set_rate(0)
        machine.stop()
        run_some(machine, 5000)
        assert machine.sweep().is_clean


def test_reading_guests_write_nothing(kind: VCpuKind) -> None:
    with ToyMachine(_options(write_share=0.0, vcpu=kind)) as machine, ToyMachine(_options()) as new:
        run_some(machine, 2000)
        for block in machine.ram:
            other = new.ram.by_idstr(block.idstr)
            assert block.read(0, block.used_length) == other.read(0, block.used_length)


@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
def test_the_tracker_sees_every_page_the_guest_wrote(backing: Backing, kind: VCpuKind) -> None:
    from guestmem import Bitmap

    options = _options(
        workload=Workload.RANDOM, smp=2, backing=backing, vcpu=kind, ring_pages=64, rate=20_000
    )
    with ToyMachine(options) as source, ToyMachine(options) as copy:
        copy_ram(source, copy)
        tracker = source.dirty_tracker()
        tracker.start()
        dirty = {block.idstr: Bitmap(block.page_count) for block in source.ram}
        source.start()
        for rounds in range(1, 6):
            enough = 50 * rounds
            until(lambda n=enough: source.vcpu_statistics()[0].ops > n, "operations")  # type: ignore[misc]
            tracker.sync(dirty)
        source.stop()
        tracker.sync(dirty)
        tracker.stop()
        for block in source.ram:
            other = copy.ram.by_idstr(block.idstr)
            for page in range(block.page_count):
                if not dirty[block.idstr].test(page):
                    assert block.read(page * PAGE, PAGE) == other.read(page * PAGE, PAGE), page
        assert dirty["toy.ram"].count() > 64


def test_kicks_do_nothing_to_a_guest_that_is_awake(kind: VCpuKind) -> None:
    with ToyMachine(_options(smp=2, vcpu=kind, workload=Workload.RANDOM)) as machine:
        for _ in range(50):
            machine.start()
            machine.stop()
        run_some(machine, 1000)
        assert machine.sweep().is_clean


def test_nothing_is_left_behind(kind: VCpuKind) -> None:
    before = snapshot()
    with ToyMachine(_options(smp=2, vcpu=kind, ring_pages=64)) as machine:
        run_some(machine, 100)
        machine.start()
    assert not leaked(before)


def test_a_signal_number_of_its_own() -> None:
    assert signal.SIGRTMIN < lib.guard_kick_signal() < signal.SIGRTMAX


_STRAY = """
import mmap, os
from guestmem import RAMBlock
from migration.toyvm import ToyMachine, ToyOptions
with ToyMachine(ToyOptions(ram_bytes=1 << 20)) as machine:
    machine.start()
    fd = os.memfd_create("short")
    os.ftruncate(fd, 4096)
    view = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    print(view[0])
"""


def test_a_stray_bus_error_is_not_ours_to_swallow() -> None:
    """Outside a vCPU's probe SIGBUS does what it did before: here it ends the process."""
    result = subprocess.run(
        [sys.executable, "-c", _STRAY], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == -signal.SIGBUS, result.stderr
    assert result.stdout == ""
