"""Machines with a snapshot directory, and what a test needs to know of their state."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from migration.runtime.snapshots.files import names_in
from migration.toyvm.machine import ToyMachine
from migration.wire.io import Reader, Writer
from tests.support.pair import MIB, Side, side

SHAPE: dict[str, Any] = {
    "ram_bytes": 16 * MIB,
    "smp": 2,
    "disk_bytes": 2 * MIB,
    "window_pages": 8,
    "extra_blocks": (("toy.more", 4 * MIB),),
}


@contextmanager
def snapshot_side(directory: Path, *, mapped: bool = False, **options: Any) -> Iterator[Side]:
    """One machine of :data:`SHAPE` that keeps its snapshots in ``directory``."""
    with side(**{**SHAPE, **options}) as one:
        one.service.snapshots.directory = directory
        one.service.set_capabilities({"mapped-ram": mapped})
        yield one


def operations(machine: ToyMachine) -> list[int]:
    """What each vCPU has done in its life: tells one moment of a guest from another."""
    return [vcpu.ops for vcpu in machine.vcpu_statistics()]


def whole_names(directory: Path) -> list[str]:
    """Names of the snapshots; nothing else lies in the directory but what belongs to them."""
    names = names_in(directory)
    wanted = {f"{name}.vmstate{suffix}" for name in names for suffix in ("", ".json")}
    assert {entry.name for entry in directory.iterdir()} <= wanted
    return names


class Gate:
    """Old-style device state that is saved (and loaded) only when the test lets it."""

    def __init__(self, machine: ToyMachine) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        machine.registry.register_legacy("gate", 0, 1, save=self._save, load=self._load)

    def _wait(self) -> None:
        self.reached.set()
        assert self.opened.wait(60)

    def _save(self, writer: Writer) -> None:
        self._wait()
        writer.write(b"gate")

    def _load(self, reader: Reader, version_id: int) -> None:
        self._wait()
        assert reader.read(4) == b"gate"
