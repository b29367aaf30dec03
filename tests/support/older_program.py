"""The program as it was when ``toy-1.0`` was the newest machine: it knows no later subsection.

There is one program in this repository, so the older one is the newer one with the descriptions of
that time in its registry. Everything else of it is real: channels, threads, RAM, faults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from migration.toyvm import ToyMachine
from migration.toyvm.devices.cpu import CPU
from migration.toyvm.devices.cpu_kvm import KVM
from migration.toyvm.devices.disk import DISK
from tests.support.pair import Side, side

OLD_CPU = dataclasses.replace(CPU, subsections=(KVM,))
"""Without ``toy-cpu/clock``."""

OLD_DISK = dataclasses.replace(DISK, subsections=())
"""Without ``toy-disk-state/label``."""

_OLD = {CPU.name: OLD_CPU, DISK.name: OLD_DISK}


@contextmanager
def older_side(**options: Any) -> Iterator[Side]:
    """A machine of the older program with its service."""
    with side(machine_type="toy-1.0", **options) as one:
        _forget(one.machine)
        yield one


def _forget(machine: ToyMachine) -> None:
    for entry in machine.registry:
        if entry.vmsd is not None:
            entry.vmsd = _OLD.get(entry.vmsd.name, entry.vmsd)
