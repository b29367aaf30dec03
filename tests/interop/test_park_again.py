"""Parked, given, parked again: everything is kept; and with KVM, a guest that runs all the time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.guest_hops import finish_sending, listen, park, send, start_verb, unpark, way
from tests.support.guest_image import GuestLayout, layout_for
from tests.support.guest_vm import GuestOptions, GuestVM, kvm_runs_the_guest
from tests.support.monitor_process import ROOT, postcopy_argv
from tests.support.need import need
from tests.support.qemu import MIB, QemuBinary, qemu_binary, require_qemu

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop

OPTIONS = GuestOptions(layout_for(32 * MIB))
# Few pages: where KVM must emulate every instruction of the guest, a pass over all takes long.
KVM = GuestOptions(GuestLayout(64 * MIB, stride=32768, step=512), accel="kvm")


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_everything_is_kept(qemu_binary: QemuBinary, tmp_path: Path, mode: str) -> None:
    """RAM page by page and devices field by field, as the analyser sees them."""
    first, second = tmp_path / "first", tmp_path / "second"
    with GuestVM(qemu_binary, OPTIONS) as vm:
        vm.serial.wait_passes(2)
        vm.execute("stop")
        park(vm, first, mode, "unix")
    with GuestVM(qemu_binary, OPTIONS, incoming="defer", paused=True) as vm:
        unpark(first, vm, "unix")
        park(vm, second, mode, "unix")
    done = subprocess.run(
        postcopy_argv("analyze", str(first), "--diff", str(second)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # The battery-backed clock goes on whatever the guest does.
    differences = [line for line in done.stdout.splitlines() if "mc146818rtc" not in line]
    assert differences in ([], ["no difference"]), done.stdout + done.stderr


@pytest.fixture
def kvm() -> QemuBinary:
    """A QEMU whose KVM runs the guest."""
    binary = require_qemu()
    need(kvm_runs_the_guest(binary), "KVM here runs no guest (no /dev/kvm, or it is of no use)")
    return binary


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "postcopy-later", "preempt"])
def test_a_kvm_guest_is_parked_while_it_runs(kvm: QemuBinary, tmp_path: Path, mode: str) -> None:
    """Dirty pages come from the real thing, faults from real vCPUs."""
    directory = tmp_path / "vm"
    with GuestVM(kvm, KVM) as vm:
        vm.serial.wait_passes(2)
        park(vm, directory, mode, "unix")
    with GuestVM(kvm, KVM, incoming="defer") as vm:
        unpark(directory, vm, "unix", preempt=mode == "preempt")
        vm.assert_runs_clean()


@pytest.mark.parametrize("mode", ["precopy", "postcopy-later"])
def test_a_kvm_guest_passes_through(kvm: QemuBinary, mode: str) -> None:
    with (
        GuestVM(kvm, KVM) as source,
        GuestVM(kvm, KVM, incoming="defer") as target,
        way("unix", to_us=True) as in_,
        way("unix", to_us=False) as out,
    ):
        source.serial.wait_passes(2)
        relay, here = start_verb("relay", in_, listen(target, out))
        with relay:
            send(source, here, mode)
            relay.succeed()
            finish_sending(source)
        target.wait_status("completed")
        target.assert_runs_clean()


def test_from_one_version_to_another(tmp_path: Path, qemu_binary: QemuBinary) -> None:
    """Parked by one QEMU, run by the other: the machine type is what counts."""
    from tests.support.qemu import newer_qemu

    other = newer_qemu() if qemu_binary == require_qemu() else require_qemu()
    need(other, "no second QEMU (10.0) unpacked: `make qemu-10` does it where there is a mirror")
    assert other is not None
    directory = tmp_path / "vm"
    with GuestVM(qemu_binary, OPTIONS) as vm:
        vm.serial.wait_passes(2)
        vm.execute("stop")
        park(vm, directory, "postcopy", "unix")
    with GuestVM(other, OPTIONS, incoming="defer") as vm:
        unpark(directory, vm, "unix")
        vm.assert_runs_clean()
