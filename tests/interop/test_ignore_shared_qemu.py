"""``x-ignore-shared`` with a stock QEMU: both open one file as their RAM, no page is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing
from tests.interop.test_wire_qemu import (
    CONTENTS,
    LOAD_AT,
    OPTIONS,
    RAM_BYTES,
    expected_ram,
    ram_of,
)
from tests.support.pair import side
from tests.support.qemu import Qemu, QemuBinary, qemu_binary

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = Path("/dev/shm") / f"postcopy-{os.getpid()}-{tmp_path.name}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def ours(file: Path) -> dict[str, Any]:
    return {**OPTIONS, "backing": Backing.FILE, "path": str(file)}


def theirs(file: Path) -> tuple[str, ...]:
    """The same file as the RAM of a machine of type none."""
    backend = f"memory-backend-file,id=ram,size={RAM_BYTES},mem-path={file},share=on"
    return ("-object", backend, "-machine", "memory-backend=ram")


def test_ours_to_qemu_without_a_page(qemu_binary: QemuBinary, file: Path) -> None:
    with side(**ours(file)) as source:
        source.machine.ram.by_idstr("ram").write(LOAD_AT, CONTENTS)
        source.machine.start()
        with Qemu(qemu_binary, ram_bytes=RAM_BYTES, incoming="defer", args=theirs(file)) as qemu:
            uri = f"unix:{qemu.folder}/migration"
            qemu.set_capabilities("return-path", "x-ignore-shared")
            qemu.execute("migrate-incoming", uri=uri)
            source.service.set_capabilities({"x-ignore-shared": True})
            source.service.migrate(uri)
            assert source.service.wait(60) == "completed", source.service.query()
            qemu.wait_status("completed")
            assert qemu.ram() == expected_ram()
            figures = source.service.query()["ram"]
            assert isinstance(figures, dict)
            assert (figures["normal"], figures["duplicate"]) == (0, 0)


def test_qemu_to_ours_without_a_page(qemu_binary: QemuBinary, file: Path) -> None:
    contents = {LOAD_AT: CONTENTS}
    with (
        Qemu(qemu_binary, ram_bytes=RAM_BYTES, load=contents, args=theirs(file)) as qemu,
        side(**ours(file), incoming=True) as target,
    ):
        uri = f"unix:{qemu.folder}/migration"
        target.service.set_capabilities({"x-ignore-shared": True, "postcopy-ram": False})
        target.service.migrate_incoming(uri)
        qemu.set_capabilities("return-path", "x-ignore-shared")
        qemu.execute("migrate", uri=uri)
        qemu.wait_status("completed")
        assert target.service.wait(60) == "completed", target.service.query()
        assert ram_of(target.machine) == expected_ram()
        assert target.machine.run_state == "running"
        assert target.figures["pages-copied"] == 0
