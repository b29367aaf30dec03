"""Machines and services in this very process, for tests that look inside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from guestmem import Backing
from migration.runtime.service import MigrationService
from migration.toyvm.machine import ToyMachine
from migration.toyvm.options import ToyOptions

MIB = 1 << 20
TIMEOUT_S = 60.0


class Side:
    """A machine, its service and every event, in order."""

    def __init__(self, **options: Any) -> None:
        self.machine = ToyMachine(ToyOptions(**options))
        self.service = MigrationService(self.machine)
        self.events: list[tuple[str, dict[str, object]]] = []
        self._changed = threading.Condition()
        self.service.add_listener(self._note)

    def _note(self, name: str, data: dict[str, object]) -> None:
        with self._changed:
            self.events.append((name, data))
            self._changed.notify_all()

    def wait_event(self, name: str, **data: object) -> None:
        """Until such an event was seen, however long ago."""
        with self._changed:
            came = self._changed.wait_for(lambda: (name, data) in self.events, TIMEOUT_S)
        assert came, f"{name} {data} did not come; came: {self.events}; {self.service.query()}"

    def wait_count(self, name: str, count: int, **data: object) -> None:
        """Until such an event was seen ``count`` times."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: self.events.count((name, data)) >= count, TIMEOUT_S
            )
        assert came, (
            f"{name} {data} did not come {count} times: {self.events}; {self.service.query()}"
        )

    def wait_status(self, status: str) -> None:
        self.wait_event("MIGRATION", status=status)

    @property
    def statuses(self) -> list[object]:
        """Statuses in the order they were entered."""
        return [data["status"] for name, data in self.events if name == "MIGRATION"]

    @property
    def figures(self) -> dict[str, Any]:
        """``x-postcopy`` of query-migrate."""
        figures = self.service.query()["x-postcopy"]
        assert isinstance(figures, dict)
        return figures

    def assert_sweep_clean(self) -> None:
        """Stop the guest; every page of every block holds what its guest wrote."""
        self.service.stop_guest()
        report = self.machine.sweep()
        assert report.errors == 0, report
        assert report.pages_checked == self.machine.ram.total_length >> 12

    def close(self) -> None:
        self.service.close()
        self.machine.close()


@contextmanager
def side(**options: Any) -> Iterator[Side]:
    """One machine with its service, closed at the end."""
    one = Side(**options)
    try:
        yield one
    finally:
        one.close()


@contextmanager
def pair(
    *, postcopy: bool = True, destination: dict[str, Any] | None = None, **options: Any
) -> Iterator[tuple[Side, Side]]:
    """A source and a machine of the same shape that waits for it.

    :param destination: options in which the destination differs.
    """
    options.setdefault("ram_bytes", 32 * MIB)
    with (
        side(**options) as source,
        side(**{**options, **(destination or {}), "incoming": True}) as target,
    ):
        for each in (source, target):
            each.service.set_capabilities({"postcopy-ram": postcopy})
        yield source, target


BACKINGS = [Backing.ANON, Backing.MEMFD, Backing.HUGETLB]
