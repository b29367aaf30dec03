"""A machine of RAM blocks and nothing else, as many as a test wants: what fits the runtime's
:class:`~migration.runtime.machine.Machine` can be migrated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from guestmem import Bitmap, DirtyTracker, MemoryBackend, RAMBlock, RAMList, WpAsyncTracker
from migration.wire.registry import StateRegistry


class PlainMachine:
    """RAM, and somebody who starts and stops. No devices, no vCPUs."""

    machine_type = "plain"
    needs_kernel_faults = False
    incoming_run_state: str | None = None

    def __init__(
        self,
        blocks: Iterable[tuple[str, int]],
        *,
        backend: MemoryBackend | None = None,
        incoming: bool = False,
    ) -> None:
        self.run_state = "inmigrate" if incoming else "paused"
        self.registry = StateRegistry()
        with ExitStack() as stack:
            self.ram = RAMList()
            for idstr, length in blocks:
                block = (backend or MemoryBackend()).allocate(idstr, length)
                stack.callback(block.close)
                self.ram.add(block)
            self._stack = stack.pop_all()

    def blocks(self) -> list[RAMBlock]:
        return list(self.ram)

    def dirty_tracker(self) -> DirtyTracker:
        return WpAsyncTracker(self.ram)

    def note_run_state(self, state: str) -> None:
        """There is no device to carry it."""

    def start(self) -> None:
        self.run_state = "running"

    def stop(self) -> None:
        self.run_state = "paused"

    def attach_received(self, received: Mapping[str, Bitmap] | None) -> None:
        """Nobody times anything."""

    def vcpu_thread_ids(self) -> list[int]:
        return []

    def hold(self, seconds: float) -> None:
        """Nobody runs."""

    def statistics(self) -> dict[str, object]:
        return {}

    def close(self) -> None:
        self._stack.close()
