"""What the monitor steers, as far as it needs to know it.

The protocols name the few things used here, so that the monitor runs on any machine and any service
that has them. Optional abilities (snapshots, an oracle) are found by looking: a VM without them
does not list their commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable
from uuid import UUID

from migration.runtime.machine import uuid_of

from .channels import socket_address
from .fds import FDStore
from .jobs import Jobs


class MigrationControl(Protocol):
    """The migration service as seen from here. Every method may be called from any thread.

    :ivar fds: set by the monitor: gives away the descriptor stored under the name in ``fd:NAME``.
    """

    fds: Callable[[str], int] | None

    def set_capabilities(self, changes: Mapping[str, bool]) -> None: ...
    def capabilities(self) -> dict[str, bool]: ...
    def set_parameters(self, changes: Mapping[str, object]) -> None: ...
    def parameters(self) -> dict[str, object]: ...
    def migrate(self, uri: str, *, resume: bool = False) -> None: ...
    def migrate_incoming(self, uri: str) -> object: ...
    def start_postcopy(self) -> None: ...
    def cancel(self) -> None: ...
    def pause(self) -> None: ...
    def yank(self) -> None: ...
    def take_back(self, *, not_running_elsewhere: bool) -> None: ...
    @property
    def is_busy(self) -> bool: ...
    def recover(self, uri: str) -> object: ...
    def continue_(self, state: str) -> None: ...
    def query(self) -> dict[str, object]: ...
    def calc_dirty_rate(self, calc_time_ms: int, sample_pages: int | None = None) -> None: ...
    def query_dirty_rate(self, unit: str = "second") -> dict[str, object]: ...
    def cont(self) -> None: ...
    def stop_guest(self) -> None: ...
    def wait(self, timeout_s: float | None) -> str: ...


class Guest(Protocol):
    """The machine as seen from here."""

    @property
    def run_state(self) -> str: ...
    def statistics(self) -> dict[str, object]: ...


class Verdict(Protocol):
    """What a check of all memory found."""

    def as_json(self) -> dict[str, object]: ...


@runtime_checkable
class Sweepable(Protocol):
    """A machine whose memory can be checked against what its guest wrote."""

    def sweep(self) -> Verdict: ...


class LatencyCounts(Protocol):
    """A latency histogram."""

    def octaves_us(self) -> list[int]:
        """24 counts by powers of two of microseconds, as in QEMU's ``postcopy-latency-dist``."""
        ...


@runtime_checkable
class FeelsLatency(Protocol):
    """A machine whose guest times its own touches of missing pages."""

    def latency(self) -> LatencyCounts: ...


@runtime_checkable
class Snapshots(Protocol):
    """A service that keeps snapshots of the whole machine by name."""

    def savevm(self, name: str) -> None: ...
    def loadvm(self, name: str) -> None: ...
    def delvm(self, name: str) -> None: ...
    def list_snapshots(self) -> list[dict[str, object]]: ...


@runtime_checkable
class KnowsMemory(Protocol):
    """A service that can tell what guest RAM is made of."""

    def query_memdev(self) -> list[dict[str, object]]: ...


class Monitor:
    """One VM's monitor state, shared by all its clients.

    :ivar on_quit: called once with the reason (QEMU's ``ShutdownCause`` spelling) when a client
        asks the process to end; must only note the wish and return.
    :ivar jobs: long commands under way.
    :ivar exits_on_incoming_error: whether a failed incoming migration ends the process, as
        ``migrate-incoming``'s ``exit-on-error`` says.
    """

    def __init__(
        self,
        service: MigrationControl,
        machine: Guest,
        *,
        on_quit: Callable[[str], None],
        name: str | None = None,
    ) -> None:
        self.service = service
        self.machine = machine
        self.on_quit = on_quit
        self.name = name
        self.fds = FDStore()
        self.jobs = Jobs()
        service.fds = self.fds.take
        self.exits_on_incoming_error = True
        self._listening: str | None = None
        self._has_events = service.capabilities().get("events", True)

    @property
    def uuid(self) -> UUID:
        """The VM's; all zeros where it has none, as QEMU answers."""
        return uuid_of(self.machine) or UUID(int=0)

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """Pass changes on; remembers what the server must know without asking the service."""
        self.service.set_capabilities(changes)
        self._has_events = self.service.capabilities().get("events", True)

    def migrate_incoming(self, uri: str) -> str:
        """Listen for a migration; where exactly (a port 0 replaced by the real one)."""
        bound = self.service.migrate_incoming(uri)
        self._listening = bound if isinstance(bound, str) else uri
        return self._listening

    def query_migrate(self) -> dict[str, object]:
        """``query-migrate``'s answer, with ``socket-address`` where the destination listens."""
        info = self.service.query()
        if self._listening is not None and info.get("status") == "setup":
            address = socket_address(self._listening)
            if address is not None:
                info.setdefault("socket-address", [address])
        return info

    def forwards(self, event: str) -> bool:
        """Whether clients get this event: migration events only with the capability ``events``.

        Called inside the service's own notification, so it must not ask the service.
        """
        return self._has_events or not event.startswith("MIGRATION")
