"""Start a migration that goes over to postcopy before the first page was sent."""

from __future__ import annotations

from migration.runtime.service import MigrationService


def migrate_by_postcopy(service: MigrationService, uri: str) -> None:
    """``migrate``, and ``migrate-start-postcopy`` by the migration's own thread the moment it is
    active: no precopy page is on its way then, so that every page is missing at the destination."""
    waits = True

    def go(name: str, data: dict[str, object]) -> None:
        nonlocal waits
        if waits and name == "MIGRATION" and data["status"] == "active":
            waits = False
            service.start_postcopy()

    service.add_listener(go)
    service.migrate(uri)
