"""Which devices a machine type has, and driving them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guestmem import Bitmap, DirtyTracker, KvmLogTracker, RAMBlock, WpAsyncTracker
from migration.wire.globalstate import GLOBALSTATE, GlobalState
from migration.wire.timer import TIMER

from .devices.console import CONSOLE, Console
from .devices.cpu import CPU, CpuDevice
from .devices.ring import RING, RingDevice
from .devices.timer import HEARTBEAT, GuestClock, Heartbeat
from .oracle import OwnedRange, SweepReport
from .tracking import VmmAwareTracker

if TYPE_CHECKING:
    from .machine import ToyMachine


@dataclass
class Devices:
    """The devices a machine has; what it has not is ``None`` or empty."""

    cpus: list[CpuDevice] = field(default_factory=list)
    clock: GuestClock = field(default_factory=GuestClock)
    global_state: GlobalState = field(default_factory=GlobalState)
    heartbeat: Heartbeat | None = None
    console: Console | None = None
    ring: RingDevice | None = None

    def go(self) -> None:
        """Device threads run."""
        if self.ring:
            self.ring.go()

    def halt(self) -> None:
        """Returns when no device thread touches RAM any more."""
        if self.ring:
            self.ring.halt()

    def on_start(self) -> None:
        """The guest was started (not just let go again after a moment)."""
        self.clock.go()
        if self.heartbeat:
            self.heartbeat.arm()
        self._print("guest runs")

    def on_stop(self) -> None:
        """The guest was stopped."""
        self.clock.halt()
        self._print("guest stands still")

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

    def dirty_tracker(self, machine: ToyMachine) -> DirtyTracker:
        """What sees all writes of this machine."""
        if machine.kvm is None:
            return WpAsyncTracker(machine.ram)
        log = KvmLogTracker(machine.ram, machine.kvm.fd, machine.kvm.slots)
        return VmmAwareTracker(log, self._vmm_writes())

    def _vmm_writes(self) -> dict[str, Bitmap]:
        """Bitmaps in which devices note their own writes to guest RAM, by block."""
        return {self.ring.block.idstr: self.ring.written} if self.ring else {}

    def statistics(self) -> dict[str, object]:
        """What the devices add to the machine's figures."""
        return {
            "ring_head": self.ring.head if self.ring else 0,
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
    register(GLOBALSTATE, devices.global_state, 0)
    return devices


def _toy_devices(machine: ToyMachine, devices: Devices, stack: ExitStack) -> None:
    options = machine.options
    register = machine.registry.register
    for vcpu in machine.vcpus:
        cpu = CpuDevice(vcpu, machine.aux, sends_clock=options.machine_type != "toy-1.0")
        devices.cpus.append(cpu)
        register(CPU, cpu, vcpu.index)
    devices.heartbeat = Heartbeat(devices.clock)
    register(HEARTBEAT, devices.heartbeat, 0)
    devices.console = Console()
    register(CONSOLE, devices.console, 0)
    if options.has_ring:
        devices.ring = _ring(machine, stack)
        register(RING, devices.ring, 0)


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
