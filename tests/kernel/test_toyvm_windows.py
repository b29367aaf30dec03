"""Windows onto RAM are made again on load while the pages behind them are still missing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from guestmem import TARGET_PAGE_BYTES as PAGE
from migration.toyvm import ToyMachine, ToyOptions
from migration.toyvm.devices.window import Window, WindowDevice
from tests.support.pair import MIB, pair
from tests.support.toyvm_machines import load_devices, missing_ram, run_some, save_devices

pytestmark = pytest.mark.kernel

PLAIN, READ_ONLY, MOVING, MORE = (number << 40 for number in (1, 2, 3, 4))
SHAPE: dict[str, Any] = {"ram_bytes": 2 * MIB, "smp": 1, "ring_pages": 0, "window_pages": 4}


def windows(machine: ToyMachine) -> WindowDevice:
    device = machine.devices.windows
    assert device is not None
    return device


def change_layout(device: WindowDevice) -> None:
    """What a guest does with them: one more, one moved far, one given up and made anew."""
    device.map(MORE, Window(0, 100 * PAGE, 2 * PAGE, is_readonly=True))
    device.move(MOVING, 40 * PAGE)
    device.unmap(PLAIN)
    device.map(PLAIN, Window(0, 7 * PAGE, 8 * PAGE))


def test_post_load_looks_through_every_window_and_sleeps_there() -> None:
    """Mapped, aliased, read-only, moved: one fault for each page they show, served meanwhile."""
    one, two = ToyOptions(**SHAPE), ToyOptions(incoming=True, **SHAPE)
    with ToyMachine(one) as source, ToyMachine(two) as destination:
        run_some(source, 100)
        change_layout(windows(source))
        windows(source).map(5 << 40, Window(0, 7 * PAGE, PAGE))  # shows what the plain one shows
        data = save_devices(source)
        with missing_ram(destination, source) as missing:
            loader = threading.Thread(target=load_devices, args=(destination, data))
            loader.start()
            faults = []
            for _ in range(4):
                faults.append(missing.wait_fault())
                assert loader.is_alive(), "it did not wait for the page"
                missing.place(faults[-1])
            loader.join(20)
            assert not loader.is_alive()
            host = destination.ram.by_idstr("toy.ram").host
            assert faults == [host + page * PAGE for page in (7, 0, 40, 100)]
            assert windows(destination).windows == windows(source).windows
            missing.place_rest()
            assert destination.sweep().is_clean
        assert windows(destination).read(5 << 40, PAGE) == windows(source).read(PLAIN, PAGE)


@pytest.mark.e2e
def test_windows_in_a_postcopy(tmp_path: Path) -> None:
    """The layout arrives with the devices, the pages behind it come when they are looked at."""
    with pair(ram_bytes=16 * MIB, window_pages=4, ring_pages=0) as (source, target):
        source.service.cont()
        run_some(source.machine, 1)
        change_layout(windows(source.machine))
        source.service.cont()
        uri = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(uri)
        source.service.start_postcopy()
        assert source.service.wait(60) == target.service.wait(60) == "completed"
        target.assert_sweep_clean()
        here, there = windows(source.machine), windows(target.machine)
        # Starting the guest moves the third window on by a page, and nothing else.
        here.move(MOVING, here.windows[MOVING].offset + PAGE)
        assert there.windows == here.windows
        ram = target.machine.ram.by_idstr("toy.ram")
        for address, window in there.windows.items():
            assert there.read(address, window.length) == ram.read(window.offset, window.length)
