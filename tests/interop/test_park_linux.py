"""A Linux guest, busy with memory and clock, is parked and comes back, or passes through."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support.guest_hops import (
    finish_sending,
    listen,
    park,
    send,
    start_verb,
    unpark,
    way,
)
from tests.support.guest_linux import complaints, linux_options, rounds
from tests.support.guest_vm import GuestVM
from tests.support.qemu import QemuBinary, newer_qemu, require_qemu

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.timeout(300)]

BOOT_S = 120.0


def binary() -> QemuBinary:
    """One whose TCG does not lose what a running guest writes in precopy, where there is one."""
    return newer_qemu() or require_qemu()


def boot() -> GuestVM:
    vm = GuestVM(binary(), linux_options())
    try:
        vm.serial.wait_line("R 3 ", timeout_s=BOOT_S)
        if vm.binary.version < (9, 0):
            vm.execute("stop")
    except BaseException:
        vm.close()
        raise
    return vm


def assert_well(vm: GuestVM, last: tuple[int, int, int]) -> None:
    """It goes on where it was: rounds in order, time never back, nothing wrong, no complaint."""
    vm.serial.wait_line("R ")
    for _ in range(4):
        vm.serial.wait_line("R ")
    seen = rounds(vm.serial.lines)
    numbers = [number for number, _, _ in seen]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert last[0] <= numbers[0] <= last[0] + 2
    assert all(bad == 0 for _, _, bad in seen)
    assert all(before[1] <= after[1] for before, after in itertools.pairwise(seen))
    assert seen[0][1] >= last[1]
    assert complaints(vm.serial.lines) == []


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "postcopy-later"])
def test_linux_is_parked_and_goes_on(tmp_path: Path, mode: str) -> None:
    directory = tmp_path / "vm"
    with boot() as vm:
        park(vm, directory, mode, "unix")
        assert complaints(vm.serial.lines) == []
        last = rounds(vm.serial.lines)[-1]
    with GuestVM(binary(), linux_options(), incoming="defer") as vm:
        unpark(directory, vm, "unix")
        assert_well(vm, last)


def test_linux_passes_through() -> None:
    with (
        boot() as source,
        GuestVM(binary(), linux_options(), incoming="defer") as target,
        way("unix", to_us=True) as in_,
        way("unix", to_us=False) as out,
    ):
        relay, here = start_verb("relay", in_, listen(target, out))
        with relay:
            send(source, here, "postcopy")
            relay.succeed()
            finish_sending(source)
        target.wait_status("completed")
        assert_well(target, rounds(source.serial.lines)[-1])
