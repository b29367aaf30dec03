"""Which devices a machine type has, and driving them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guestmem import (
    TARGET_PAGE_BYTES,
    Bitmap,
    DirtyTracker,
    RAMBlock,
)
from migration.wire.compat import ConfigurableDevice, apply_property
from migration.wire.globalstate import GLOBALSTATE, GlobalState
from migration.wire.timer import TIMER

from .compat import MACHINES
from .devices.console import CONSOLE, Console
from .devices.cpu import CPU, CpuDevice
from .devices.disk import DISK, Disk
from .devices.disk_driver import DiskDriver
from .devices.disk_live import DiskMigration
from .devices.ring import RING, RingDevice
from .devices.timer import HEARTBEAT, GuestClock, Heartbeat
from .devices.window import WINDOWS, Window, WindowDevice
from .options import OptionError, ToyOptions
from .oracle import BadPage, Damage, OwnedRange, SweepReport, identity_damage
from .tracking import VmmAwareTracker, choose_tracker

if TYPE_CHECKING:
    from .machine import ToyMachine

# Guest addresses of the windows, far above any RAM.
_PLAIN, _READ_ONLY, _MOVING = (number << 40 for number in (1, 2, 3))


@dataclass
class Devices:
    """The devices a machine has; what it has not is ``None`` or empty."""

    cpus: list[CpuDevice] = field(default_factory=list)
    clock: GuestClock = field(default_factory=GuestClock)
    global_state: GlobalState = field(default_factory=GlobalState)
    heartbeat: Heartbeat | None = None
    console: Console | None = None
    ring: RingDevice | None = None
    disk: Disk | None = None
    disk_driver: DiskDriver | None = None
    disk_migration: DiskMigration | None = None
    windows: WindowDevice | None = None
    _window_room: int = 0

    def go(self) -> None:
        """Device threads run."""
        if self.ring:
            self.ring.go()
        if self.disk_driver:
            self.disk_driver.go()

    def halt(self) -> None:
        """Returns when no device thread touches RAM any more."""
        if self.ring:
            self.ring.halt()
        if self.disk_driver:
            self.disk_driver.halt()

    def on_start(self) -> None:
        """The guest was started (not just let go again after a moment)."""
        self.clock.go()
        if self.heartbeat:
            self.heartbeat.arm()
        if self.windows:
            self._move_window(self.windows)
        self._print("guest runs")

    def on_stop(self) -> None:
        """The guest was stopped."""
        self.clock.halt()
        self._print("guest stands still")

    def _move_window(self, device: WindowDevice) -> None:
        """The guest moves its third window on by a page. Touches no RAM."""
        window = device.windows.get(_MOVING)
        if window is not None:
            room = self._window_room - window.length
            offset = window.offset + TARGET_PAGE_BYTES
            device.move(_MOVING, offset if offset <= room else 0)

    def _print(self, what: str) -> None:
        if self.console:
            ops = sum(int(cpu.state.ops) for cpu in self.cpus)
            self.console.write(f"{what}, {ops} operations done\n".encode())

    def owned_ranges(self) -> list[OwnedRange]:
        """Pages the oracle leaves to the devices."""
        return [self.ring.owned] if self.ring else []

    def sweep(self, blocks: list[RAMBlock]) -> Iterator[SweepReport]:
        """The devices' verdicts on their own pages."""
        if self.ring:
            yield self.ring.sweep(blocks)
        if self.disk:
            chunks = self.disk.sweep()
            bad = tuple(BadPage("toy-disk", index, Damage.DISK, 0, 0) for index in chunks)
            yield SweepReport(0, len(chunks), bad)

    def dirty_tracker(self, machine: ToyMachine) -> DirtyTracker:
        """What sees all writes of this machine."""
        tracker = choose_tracker(machine.options.dirty_tracker, machine.ram, machine.kvm)
        return tracker if tracker.sees_own_writes else VmmAwareTracker(tracker, self._vmm_writes())

    def _vmm_writes(self) -> dict[str, Bitmap]:
        """Bitmaps in which devices note their own writes to guest RAM, by block."""
        return {self.ring.block.idstr: self.ring.written} if self.ring else {}

    def statistics(self) -> dict[str, object]:
        """What the devices add to the machine's figures."""
        return {
            "ring_head": self.ring.head if self.ring else 0,
            "disk_chunks_sent": self.disk_migration.chunks_sent if self.disk_migration else 0,
            "guest_clock_ms": self.clock.now_ns() / 1e6,
        }


def assemble(machine: ToyMachine, stack: ExitStack) -> Devices:
    """Make the machine's devices and register their state in wire order."""
    options = machine.options
    devices = Devices()
    register = machine.registry.register
    register(TIMER, devices.clock, 0)
    if not options.is_bare:
        _toy_devices(machine, devices, stack)
    _set_properties(options, devices)
    register(GLOBALSTATE, devices.global_state, 0)
    return devices


def _toy_devices(machine: ToyMachine, devices: Devices, stack: ExitStack) -> None:
    options = machine.options
    register = machine.registry.register
    for vcpu in machine.vcpus:
        cpu = CpuDevice(vcpu, machine.aux)
        devices.cpus.append(cpu)
        register(CPU, cpu, vcpu.index)
    devices.heartbeat = Heartbeat(devices.clock)
    register(HEARTBEAT, devices.heartbeat, 0)
    devices.console = Console()
    register(CONSOLE, devices.console, 0)
    if options.has_ring:
        devices.ring = _ring(machine, stack)
        register(RING, devices.ring, 0)
    if options.disk_bytes:
        _disk(machine, devices, stack)
    if options.window_pages:
        _windows(machine, devices)


def _set_properties(options: ToyOptions, devices: Devices) -> None:
    """Those of the machine type, then the user's own.

    :raises OptionError: the user's name a device, property or value there is not.
    """
    configurable: list[ConfigurableDevice] = [*devices.cpus]
    if devices.disk:
        configurable.append(devices.disk)
    if not options.is_bare:
        MACHINES.apply(options.machine_type, configurable)
    for setting in options.global_properties:
        try:
            was_set = apply_property(setting, configurable)
        except ValueError as error:
            raise OptionError(f"-global {error}") from None
        if not was_set:
            known = ", ".join(sorted({each.device_type for each in configurable})) or "none"
            raise OptionError(
                f"-global {setting.device}.{setting.property}: this machine has no such device "
                f"(with properties: {known})"
            )


def _disk(machine: ToyMachine, devices: Devices, stack: ExitStack) -> None:
    options = machine.options
    devices.disk = Disk(options.disk_bytes, seed=options.seed, path=options.disk_path)
    stack.callback(devices.disk.close)
    devices.disk_driver = DiskDriver(devices.disk, seed=options.seed)
    stack.callback(devices.disk_driver.close)
    devices.disk_migration = DiskMigration(devices.disk)
    machine.registry.register_live(devices.disk_migration)
    machine.registry.register(DISK, devices.disk, 0)


def _windows(machine: ToyMachine, devices: Devices) -> None:
    """Three windows on the first block: one plain, one read-only on the same RAM, one that
    moves."""
    blocks = list(machine.ram)
    length = machine.options.window_pages * TARGET_PAGE_BYTES
    device = WindowDevice(blocks, lambda *page: identity_damage(machine.aux, *page))
    devices.windows = device
    devices._window_room = int(machine.aux.layout.filled[0]) * TARGET_PAGE_BYTES
    if not machine.options.incoming:
        device.map(_PLAIN, Window(0, 0, length))
        device.map(_READ_ONLY, Window(0, 0, length, is_readonly=True))
        device.map(_MOVING, Window(0, 0, length))
    machine.registry.register(WINDOWS, device, 0)


def _ring(machine: ToyMachine, stack: ExitStack) -> RingDevice:
    options = machine.options
    blocks = list(machine.ram)
    ring = RingDevice(
        blocks[-1],
        len(blocks) - 1,
        options.ring_pages,
        seed=options.seed,
        rate=options.ring_rate,
    )
    stack.callback(ring.close)
    if not options.incoming:
        ring.fill()
    return ring
