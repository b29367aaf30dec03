"""The toy machine's versions, and what older ones do differently on the wire."""

from __future__ import annotations

from migration.wire.compat import CompatProperty, CompatTable, MachineVersion

MACHINES = CompatTable(
    MachineVersion("toy-1.1"),
    MachineVersion(
        "toy-1.0",
        # Before 1.1 nobody measured the downtime by the guest's clock, and disks told no labels.
        CompatProperty("toy-cpu", "x-clock", "off", optional=True),
        CompatProperty("toy-disk-state", "x-label", "off", optional=True),
    ),
)
