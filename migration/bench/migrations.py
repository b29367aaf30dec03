"""Whole migrations for benches that look at what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .vm import VM


def migrate_by_postcopy(source: VM, destination: VM, *, timeout_s: float) -> Mapping[str, Any]:
    """Over a unix socket, to the end; what ``query-migrate`` says at the source then.

    :raises BenchError: it did not complete.
    """
    for vm in (source, destination):
        vm.set_capabilities("postcopy-ram")
    uri = f"unix:{destination.folder}/m"
    destination.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
    # Precopy makes rounds until it is told otherwise, slowly: most of RAM is left for postcopy.
    source.execute("migrate-set-parameters", {"downtime-limit": 0, "max-bandwidth": 32 << 20})
    source.execute("migrate", {"uri": uri})
    source.wait_status("active", timeout_s=timeout_s)
    source.execute("migrate-start-postcopy")
    source.wait_status("completed", timeout_s=timeout_s)
    destination.wait_status("completed", timeout_s=timeout_s)
    found: Mapping[str, Any] = source.execute("query-migrate")
    return found
