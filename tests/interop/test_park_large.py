"""A guest's size is no matter of our memory: pages go straight to the files, and come from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.guest_hops import (
    Verb,
    block_file,
    finish_sending,
    listen,
    manifest_of,
    same_memory,
    send,
    start_verb,
    way,
)
from tests.support.guest_image import GuestLayout, layout_for
from tests.support.guest_matrix import wants_all
from tests.support.guest_vm import BLOCK, GuestOptions, GuestVM
from tests.support.need import need
from tests.support.qemu import MIB, newer_qemu, require_qemu

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

BOUND = 128 * MIB  # the interpreter and its modules are most of it


def memory_peak(verb: Verb) -> int:
    """Wait for its good end; the largest resident set it had, bytes, by its own word. (What
    wait4(2) says counts the memory of the test process, too, in which the child began.)"""
    return int(verb.succeed()["memory_peak_bytes"])


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_parking_takes_little_memory(tmp_path: Path, mode: str) -> None:
    """All of 512 MiB in use; a quarter of that would show."""
    options = GuestOptions(GuestLayout(512 * MIB, stride=4096, step=512))
    with GuestVM(newer_qemu() or require_qemu(), options) as vm, way("unix", to_us=True) as way_:
        vm.serial.wait_passes(1)
        vm.execute("stop")
        verb, uri = start_verb("park", way_, str(tmp_path / "vm"))
        with verb:
            send(vm, uri, mode)
            assert memory_peak(verb) < BOUND
        finish_sending(vm)
        assert block_file(tmp_path / "vm", BLOCK).stat().st_blocks * 512 > 500 * MIB
        same_memory(vm, block_file(tmp_path / "vm", BLOCK))


def host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_guest_larger_than_the_host(tmp_path: Path) -> None:
    """Half as much again as there is memory; it uses little of it, and runs on afterwards."""
    need(wants_all(), "minutes: only in `make test-interop`")
    binary = newer_qemu() or require_qemu()
    options = GuestOptions(layout_for((host_bytes() * 3 // 2) & ~(1024 * MIB - 1)))
    directory = tmp_path / "vm"
    with GuestVM(binary, options) as vm, way("unix", to_us=True) as way_:
        vm.serial.wait_passes(2)
        vm.execute("stop")
        verb, uri = start_verb("park", way_, str(directory))
        with verb:
            send(vm, uri, "postcopy")
            assert memory_peak(verb) < BOUND
        finish_sending(vm)
    assert manifest_of(directory)["state"] == "parked"
    with GuestVM(binary, options, incoming="defer") as vm, way("unix", to_us=False) as way_:
        with Verb("unpark", str(directory), listen(vm, way_)) as verb:
            assert memory_peak(verb) < BOUND
        vm.wait_status("completed", timeout_s=300)
        vm.execute("cont")
        vm.assert_runs_clean()
