"""Toy machines in tests: device state to bytes and back, RAM copied by hand, missing pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestmem import TARGET_PAGE_BYTES, Bitmap, RAMBlock
from migration.toyvm import ToyMachine
from migration.wire import headers
from migration.wire.constants import SectionType
from migration.wire.io import BytesReader, BytesWriter
from tests.support.need import need
from uffd.errors import NotPermitted
from uffd.events import PageFault
from uffd.fd import Userfaultfd

TIMEOUT_S = 20.0
_POLL_S = 0.001
_PIECE = 1 << 20


def save_devices(machine: ToyMachine) -> bytes:
    """All FULL sections, as a postcopy package or the end of a precopy has them."""
    writer = BytesWriter()
    machine.registry.save_full_sections(writer)
    headers.write_end_of_stream(writer)
    return writer.getvalue()


def load_devices(machine: ToyMachine, data: bytes) -> None:
    """Load what :func:`save_devices` wrote."""
    reader = BytesReader(data)
    started: dict[int, headers.SectionHeader] = {}
    while headers.read_section_type(reader) is not SectionType.EOF:
        header = headers.read_section_header(reader, SectionType.FULL, started)
        machine.registry.load_full_section(reader, header, with_footer=True)


def copy_ram(source: ToyMachine, destination: ToyMachine) -> None:
    """All of RAM, plainly."""
    for block in source.ram:
        other = destination.ram.by_idstr(block.idstr)
        for offset in range(0, block.used_length, _PIECE):
            length = min(_PIECE, block.used_length - offset)
            other.write(offset, block.read(offset, length))


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for what has no event of its own (a counter in memory that another thread bumps)."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {TIMEOUT_S} s for {what}"
        time.sleep(_POLL_S)


def run_some(machine: ToyMachine, operations: int = 1000) -> None:
    """Let the guest run until each vCPU did that many more operations, then stop it."""
    before = [vcpu.ops for vcpu in machine.vcpu_statistics()]
    machine.start()
    until(
        lambda: all(
            vcpu.ops - ops >= operations
            for vcpu, ops in zip(machine.vcpu_statistics(), before, strict=True)
        ),
        f"{operations} operations: {machine.statistics()}",
    )
    machine.stop()


def run_to(machine: ToyMachine, operations: int) -> None:
    """Let each vCPU run to exactly so many operations of its life, then stop the guest."""
    machine.set_stop_at(operations)
    machine.start()
    until(
        lambda: (
            not any(vcpu.is_running for vcpu in machine.vcpu_statistics())
            and all(vcpu.ops >= operations for vcpu in machine.vcpu_statistics())
        ),
        f"operation {operations}: {machine.statistics()}",
    )
    machine.stop()
    machine.set_stop_at(0)
    assert all(vcpu.ops == operations for vcpu in machine.vcpu_statistics())


class MissingRam:
    """A userfaultfd over a machine's RAM, with every page missing; contents come from ``source``.

    Also keeps the received bitmaps, as a destination does.
    """

    def __init__(self, machine: ToyMachine, source: ToyMachine) -> None:
        self.machine = machine
        self.source = source
        try:
            self.uffd = Userfaultfd.open(user_mode_only=False)
        except NotPermitted as error:
            need(False, f"userfaultfd: {error}", remedy="run the tests as root")
        self.received = {block.idstr: Bitmap(block.page_count) for block in machine.ram}
        for block in machine.ram:
            block.set_thp(False)
            block.discard(0, block.placed_length)
            self.uffd.register(block.host, block.placed_length)

    def wait_fault(self) -> int:
        """Address of the next fault (rounded to the host page)."""
        for event in self.uffd.events(timeout_s=TIMEOUT_S):
            assert isinstance(event, PageFault)
            return event.address
        raise AssertionError(f"no fault in {TIMEOUT_S} s; {self.machine.statistics()}")

    def place(self, address: int) -> None:
        """Place the host page at an address with the source's contents."""
        block, offset = self.machine.ram.find(address)
        offset -= offset % block.page_size
        data = self.source.ram.by_idstr(block.idstr).read(offset, block.page_size)
        # Marked first: whoever wants it sleeps already, and must not come by again before the mark.
        pages = block.page_size // TARGET_PAGE_BYTES
        self.received[block.idstr].set_atomic(offset // TARGET_PAGE_BYTES, pages)
        self.uffd.copy(block.host + offset, data)

    def poison(self, address: int) -> None:
        """Poison the host page at an address and wake whoever sleeps on it."""
        block, offset = self.machine.ram.find(address)
        self.uffd.poison(block.host + offset - offset % block.page_size, block.page_size)

    def place_rest(self) -> None:
        """Place every page not received yet."""
        for block in self.machine.ram:
            for offset in range(0, block.placed_length, block.page_size):
                if not self.received[block.idstr].test(offset // TARGET_PAGE_BYTES):
                    self.place(block.host + offset)

    def close(self) -> None:
        """End the watch; pages still missing read as zeros from now on."""
        self.uffd.close()


@contextmanager
def missing_ram(machine: ToyMachine, source: ToyMachine) -> Iterator[MissingRam]:
    """RAM of ``machine`` is missing inside the block. The guest is stopped on the way out."""
    missing = MissingRam(machine, source)
    try:
        yield missing
    finally:
        machine.stop()
        missing.close()


def flip(block: RAMBlock, offset: int) -> None:
    """Flip one bit in guest RAM."""
    block.write(offset, bytes([block.read(offset, 1)[0] ^ 0x10]))
