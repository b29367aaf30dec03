"""What a migration needs of a machine: its RAM, its device state, and a way to stop and start
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable
from uuid import UUID

from guestmem import Bitmap, DirtyTracker, RAMList
from migration.wire.registry import StateRegistry


class Machine(Protocol):
    """Implemented by :class:`migration.toyvm.ToyMachine`; anything that fits can be migrated."""

    @property
    def machine_type(self) -> str:
        """Name on the wire, e.g. ``toy-1.1`` or ``none``."""
        ...

    @property
    def ram(self) -> RAMList: ...

    @property
    def registry(self) -> StateRegistry: ...

    def note_run_state(self, state: str) -> None:
        """The run state that travels: what the guest was in before the migration stopped it."""
        ...

    @property
    def incoming_run_state(self) -> str | None:
        """The run state that came, None when the stream had none (then the guest is to run)."""
        ...

    run_state: str
    """QEMU's name: prelaunch, inmigrate, running, paused, finish-migrate, postmigrate, ..."""

    @property
    def needs_kernel_faults(self) -> bool:
        """Guest accesses are made by the kernel (KVM): a user-mode-only userfaultfd cannot serve
        it."""
        ...

    def start(self) -> None:
        """The vCPUs run."""
        ...

    def stop(self) -> None:
        """Returns when no vCPU runs guest code; never waits for a missing page."""
        ...

    def dirty_tracker(self) -> DirtyTracker:
        """A new tracker over all of RAM, of the kind the vCPUs need."""
        ...

    def attach_received(self, received: Mapping[str, Bitmap] | None) -> None:
        """The vCPUs time touches of pages whose bit is clear (bit per target page, by idstr)."""
        ...

    def vcpu_thread_ids(self) -> list[int]:
        """Kernel thread ids of the vCPUs, in order."""
        ...

    def hold(self, seconds: float) -> None:
        """Keep the vCPUs from running for so long; their run state does not change (throttling)."""
        ...

    def statistics(self) -> dict[str, object]: ...

    def close(self) -> None: ...


@runtime_checkable
class Identified(Protocol):
    """A machine that may have a UUID (``-uuid``). Optional: others have none."""

    @property
    def uuid(self) -> UUID | None: ...


def uuid_of(machine: object) -> UUID | None:
    """Its UUID, if it has one."""
    return machine.uuid if isinstance(machine, Identified) else None
