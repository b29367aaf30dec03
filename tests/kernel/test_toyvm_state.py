"""A toy VM's state survives the way into another one: same sequence, same memory, same clocks."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from guestmem import TARGET_PAGE_BYTES as PAGE
from migration.toyvm import ToyMachine, ToyOptions, VCpuKind, Workload
from migration.wire.errors import RemoteStreamError
from tests.support.toyvm_kvm import need_kvm
from tests.support.toyvm_machines import (
    copy_ram,
    flip,
    load_devices,
    missing_ram,
    run_some,
    run_to,
    save_devices,
    until,
)

pytestmark = pytest.mark.kernel


def _options(**changes: object) -> ToyOptions:
    base: dict[str, object] = {"ram_bytes": 2 << 20, "smp": 2, "workload": Workload.RANDOM}
    return ToyOptions(**{**base, **changes})  # type: ignore[arg-type]


@pytest.fixture(params=["thread-thread", "kvm-kvm", "thread-kvm", "kvm-thread"])
def kinds(request: pytest.FixtureRequest) -> tuple[VCpuKind, VCpuKind]:
    """vCPU kinds of source and destination: they need not be the same."""
    source, destination = (VCpuKind(kind) for kind in request.param.split("-"))
    if VCpuKind.KVM in (source, destination):
        need_kvm()
    return source, destination


def _move(source: ToyMachine, destination: ToyMachine) -> None:
    copy_ram(source, destination)
    load_devices(destination, save_devices(source))


@pytest.mark.parametrize("workload", list(Workload))
def test_the_guest_goes_on_where_it_was(
    kinds: tuple[VCpuKind, VCpuKind], workload: Workload
) -> None:
    one = _options(vcpu=kinds[0], workload=workload)
    two = _options(vcpu=kinds[1], workload=workload, incoming=True)
    with ToyMachine(one) as source, ToyMachine(two) as destination:
        run_some(source, 5000)
        _move(source, destination)
        assert destination.sweep().is_clean
        before, after = source.vcpu_statistics(), destination.vcpu_statistics()
        assert [cpu.ops for cpu in before] == [cpu.ops for cpu in after]
        run_some(destination, 5000)
        report = destination.sweep()
        assert report.is_clean, report.bad
        assert destination.statistics()["touch_errors"] == 0
        assert source.sweep().is_clean


@pytest.mark.parametrize("workload", list(Workload))
def test_source_and_destination_continue_the_very_same_sequence(
    kinds: tuple[VCpuKind, VCpuKind], workload: Workload
) -> None:
    """Run on to one operation number, both sides wrote the same pages equally often."""
    one = _options(vcpu=kinds[0], workload=workload, ring_pages=0)
    two = _options(vcpu=kinds[1], workload=workload, ring_pages=0, incoming=True)
    with ToyMachine(one) as source, ToyMachine(two) as destination:
        run_to(source, 3000)
        _move(source, destination)
        run_to(source, 7000)
        run_to(destination, 7000)
        for index in range(2):
            assert source.aux.state(index).rng == destination.aux.state(index).rng
            assert bytes(source.aux.log(index)) == bytes(destination.aux.log(index))
        ram, other = source.ram.by_idstr("toy.ram"), destination.ram.by_idstr("toy.ram")
        assert ram.read(0, ram.used_length) == other.read(0, ram.used_length)


def test_going_through_many_machines_keeps_everything(kinds: tuple[VCpuKind, VCpuKind]) -> None:
    here = ToyMachine(_options(vcpu=kinds[0]))
    for step in range(4):
        run_some(here, 1000)
        there = ToyMachine(_options(vcpu=kinds[step % 2], incoming=True))
        _move(here, there)
        here.close()
        here = there
        assert here.sweep().is_clean
    assert sum(cpu.ops for cpu in here.vcpu_statistics()) >= 8000
    here.close()


def test_histograms_and_downtime_travel_along(kinds: tuple[VCpuKind, VCpuKind]) -> None:
    one = _options(vcpu=kinds[0], workload=Workload.SEQUENTIAL, ring_pages=0)
    two = _options(vcpu=kinds[1], workload=Workload.SEQUENTIAL, ring_pages=0, incoming=True)
    with ToyMachine(one) as source, ToyMachine(one) as twin, ToyMachine(two) as destination:
        with missing_ram(source, twin) as missing:
            source.attach_received(missing.received)
            source.start()
            for _ in range(20):
                missing.place(missing.wait_fault())
            until(lambda: source.latency().count == 20, "the last of them")
            source.stop()
            missing.place_rest()
            source.attach_received(None)
        assert source.downtime_ns() is None
        felt = source.latency()
        _move(source, destination)
        there = destination.latency()
        assert (there.count, there.max_ns) == (felt.count, felt.max_ns)
        assert there.buckets == felt.buckets
        run_some(destination, 10)
        downtime = destination.downtime_ns()
        assert downtime is not None
        assert downtime > 0


def test_machine_type_1_0_does_not_send_the_clock() -> None:
    old = _options(machine_type="toy-1.0")
    with ToyMachine(old) as source, ToyMachine(_options(incoming=True)) as destination:
        run_some(source, 100)
        data = save_devices(source)
        assert b"toy-cpu/clock" not in data
        copy_ram(source, destination)
        load_devices(destination, data)
        run_some(destination, 100)
        assert destination.downtime_ns() is None
        assert b"toy-cpu/clock" in save_devices(destination)


def test_ring_load_faults_on_every_missing_page_and_verifies_it() -> None:
    """post_load sleeps on pages that a second thread places: faults during device load."""
    with ToyMachine(_options()) as source, ToyMachine(_options(incoming=True)) as destination:
        run_some(source, 1000)
        until(lambda: source.devices.ring and source.devices.ring.head >= 0, "the ring")
        data = save_devices(source)
        faults: list[int] = []
        with missing_ram(destination, source) as missing:
            loader = threading.Thread(target=load_devices, args=(destination, data))
            loader.start()
            for _ in range(64):
                address = missing.wait_fault()
                faults.append(address)
                missing.place(address)
            loader.join(20)
            assert not loader.is_alive()
            ram = destination.ram.by_idstr("toy.ram")
            first = ram.host + (ram.page_count - 64) * PAGE
            assert faults == [first + page * PAGE for page in range(64)]
            missing.place_rest()
            assert destination.sweep().is_clean


@pytest.mark.parametrize("page", [0, 31, 63])
def test_a_damaged_ring_page_fails_the_load(page: int) -> None:
    with ToyMachine(_options()) as source, ToyMachine(_options(incoming=True)) as destination:
        run_some(source, 100)
        data = save_devices(source)
        copy_ram(source, destination)
        ram = destination.ram.by_idstr("toy.ram")
        flip(ram, (ram.page_count - 64 + page) * PAGE + 20)
        with pytest.raises(RemoteStreamError, match="does not fit head"):
            load_devices(destination, data)


def test_an_old_ring_section_still_loads() -> None:
    """Version 1 had a 32-bit head and nothing else."""
    from migration.toyvm.devices.ring import RING
    from migration.wire.io import BytesReader

    with ToyMachine(_options()) as source, ToyMachine(_options(incoming=True)) as destination:
        run_some(source, 100)
        ring: Any = source.devices.ring
        copy_ram(source, destination)
        payload = ring.head.to_bytes(4, "big")
        RING.load(BytesReader(payload), destination.devices.ring, 1)
        there: Any = destination.devices.ring
        assert there.head == ring.head


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"smp": 1}, "section"),
        ({"seed": 7}, "seed"),
        ({"working_set_bytes": 1 << 20}, "working set"),
        (
            {"ring_pages": 128, "fill_share": 0.5, "working_set_bytes": 256 << 10},
            "working set|ring",
        ),
    ],
)
def test_another_shape_is_refused_by_name(changes: dict[str, object], hint: str) -> None:
    with (
        ToyMachine(_options()) as source,
        ToyMachine(_options(incoming=True, **changes)) as destination,
    ):
        run_some(source, 10)
        data = save_devices(source)
        with pytest.raises(RemoteStreamError, match=hint):
            load_devices(destination, data)


def test_a_hostile_position_is_refused_and_cannot_run() -> None:
    with ToyMachine(_options(smp=1)) as source, ToyMachine(_options(smp=1)) as destination:
        source.aux.state(0).position = 1 << 40
        with pytest.raises(RemoteStreamError, match="position"):
            load_devices(destination, save_devices(source))
        source.start()
        until(lambda: source.vcpu_statistics()[0].status == "failed", "the refusal")
        source.stop()
        assert source.vcpu_statistics()[0].ops == 0


def test_console_and_clock_go_on() -> None:
    with ToyMachine(_options()) as source, ToyMachine(_options(incoming=True)) as destination:
        run_some(source, 100)
        assert source.devices.console is not None
        source.devices.console.write(b"half a li")
        _move(source, destination)
        assert destination.devices.console is not None
        destination.devices.console.write(b"ne\n")
        lines = destination.devices.console.read_lines()
        assert lines[-1] == "half a line"
        assert lines[0].startswith("guest runs")
        stood_at = source.devices.clock.now_ns()
        assert destination.devices.clock.now_ns() == stood_at > 0
        run_some(destination, 100)
        assert destination.devices.clock.now_ns() > stood_at


def test_run_state_travels_as_it_was_before_the_migration() -> None:
    with ToyMachine(_options()) as source, ToyMachine(_options(incoming=True)) as destination:
        run_some(source, 10)
        assert destination.incoming_run_state is None
        source.note_run_state(source.run_state)
        source.run_state = "finish-migrate"
        _move(source, destination)
        assert destination.incoming_run_state == "paused"


def _kvm_subsection(data: bytes | bytearray) -> int:
    """Offset of the first vCPU's register subsection: CRC, phase, flag, regs, sregs ..."""
    name = b"toy-cpu/kvm"
    return data.index(name) + len(name) + 4


def test_registers_of_another_program_are_not_used() -> None:
    """The workload's own state is enough to go on with."""
    need_kvm()
    one, two = _options(vcpu=VCpuKind.KVM), _options(vcpu=VCpuKind.KVM, incoming=True)
    with ToyMachine(one) as source, ToyMachine(two) as destination:
        run_some(source, 1000)
        data = bytearray(save_devices(source))
        data[_kvm_subsection(data)] ^= 0xFF
        copy_ram(source, destination)
        load_devices(destination, bytes(data))
        run_some(destination, 1000)
        assert destination.sweep().is_clean


@pytest.mark.parametrize(("at", "value"), [(4, 2), (6 + 144 + 16, 0), (6 + 144 + 240, 0x13)])
def test_registers_that_are_no_guest_of_ours_are_refused(at: int, value: int) -> None:
    """A phase within an operation, kernel mode, foreign page tables."""
    need_kvm()
    one, two = _options(vcpu=VCpuKind.KVM), _options(vcpu=VCpuKind.KVM, incoming=True)
    with ToyMachine(one) as source, ToyMachine(two) as destination:
        run_some(source, 100)
        data = bytearray(save_devices(source))
        data[_kvm_subsection(data) + at] = value
        copy_ram(source, destination)
        with pytest.raises(RemoteStreamError):
            load_devices(destination, bytes(data))


def test_figures_of_a_closed_machine_are_refused() -> None:
    """What the vCPUs counted in is unmapped by then."""
    with ToyMachine(ToyOptions(ram_bytes=4 << 20)) as machine:
        run_some(machine, 10)
        assert machine.statistics()["ops"]
    for ask in (machine.statistics, machine.latency, machine.vcpu_statistics):
        with pytest.raises(RuntimeError, match="closed"):
            ask()
