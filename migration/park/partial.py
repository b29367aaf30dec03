"""What is on disk of a VM that is still coming in, so that another process can go on with it.

From a postcopy's package on the guest exists in two halves: device state here, RAM at its source.
Losing the first loses the guest, so it is on disk before anything else happens:

    .NAME.partial-XXXX/devices.bin     payloads of the device sections
    .NAME.partial-XXXX/package.json    machine, sections, blocks, the stream's RAM section

A partial directory is locked (flock(2)) by the process that writes it. One that is neither locked
nor has a package is left over from a crash and good for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migration.native import crc32c
from migration.wire.extension import Feature
from migration.wire.headers import Configuration

from .keeper import Package
from .manifest import DEVICES, ParkedDevice, ParkError, sync_directory
from .sections import OpaqueSection

PACKAGE = "package.json"
_KIND = "postcopy incoming package"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class PartialBlock:
    """A RAM block's file in a partial directory."""

    idstr: str
    used_length: int
    page_size: int
    file: str


def lay_out(sections: list[OpaqueSection]) -> tuple[tuple[ParkedDevice, ...], bytes]:
    """The table of sections and the bytes of ``devices.bin``."""
    devices, payload = [], bytearray()
    for each in sections:
        devices.append(
            ParkedDevice(
                each.idstr, each.instance_id, each.version_id, len(payload), len(each.payload)
            )
        )
        payload += each.payload
    return tuple(devices), bytes(payload)


def write_file(directory: Path, name: str, data: bytes) -> None:
    """Whole and synced, or an OSError and nothing under that name."""
    temporary = directory / f".{name}"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / name)
    sync_directory(directory)


def save_package(work: Path, package: Package, blocks: list[PartialBlock]) -> None:
    """:raises OSError: it is not on disk."""
    devices, payload = lay_out(list(package.sections))
    vm_uuid = package.configuration.uuid
    record = {
        "kind": _KIND,
        "format": _FORMAT,
        "machine": package.configuration.machine,
        "uuid": None if vm_uuid is None else str(vm_uuid),
        "ram_section_id": package.ram_section_id,
        "features": package.features.value,
        "blocks": [[b.idstr, b.used_length, b.page_size, b.file] for b in blocks],
        "devices": [[d.idstr, d.instance_id, d.version_id, d.length] for d in devices],
        "devices_crc32c": crc32c(payload),
    }
    write_file(work, DEVICES, payload)
    write_file(work, PACKAGE, (json.dumps(record, indent=1) + "\n").encode())


def load_package(work: Path) -> tuple[Package, list[PartialBlock]]:
    """:raises ParkError: damaged."""
    try:
        record = json.loads((work / PACKAGE).read_text(encoding="utf-8"))
        payload = (work / DEVICES).read_bytes()
        return _decode(record, payload)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParkError(f"{work} cannot be gone on with: {error}") from None


def _decode(record: Any, payload: bytes) -> tuple[Package, list[PartialBlock]]:
    if record["kind"] != _KIND or record["format"] != _FORMAT:
        raise ValueError("another kind of file")
    if crc32c(payload) != record["devices_crc32c"]:
        raise ValueError(f"{DEVICES} is damaged: its checksum is wrong")
    blocks = [PartialBlock(*block) for block in record["blocks"]]
    if any(Path(block.file).name != block.file for block in blocks):
        raise ValueError("a block's file lies elsewhere")
    sections, at = [], 0
    for idstr, instance_id, version_id, length in record["devices"]:
        sections.append(OpaqueSection(idstr, instance_id, version_id, payload[at : at + length]))
        at += length
    vm_uuid = None if record["uuid"] is None else uuid.UUID(record["uuid"])
    configuration = Configuration(record["machine"], uuid=vm_uuid)
    package = Package(
        configuration, tuple(sections), record["ram_section_id"], Feature(record["features"])
    )
    return package, blocks


def lock(work: Path) -> int | None:
    """A descriptor that holds the directory's lock; None: somebody else has it."""
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def partials(directory: Path) -> Iterator[Path]:
    """Partial directories of this name."""
    prefix = f".{directory.name}.partial-"
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(directory.parent)):
            if name.startswith(prefix):
                yield directory.parent / name


def find_package(directory: Path) -> Path:
    """The one partial directory that can be gone on with.

    :raises ParkError: none, several, or another process is at it.
    """
    found = [work for work in partials(directory) if (work / PACKAGE).exists()]
    if not found:
        raise ParkError(f"no interrupted park of {directory}: nothing to resume")
    if len(found) > 1:
        raise ParkError(
            f"several interrupted parks: {', '.join(map(str, found))}; remove all but one"
        )
    return found[0]


def remove_leftovers(directory: Path) -> None:
    """Those of dead processes that nobody can go on with."""
    for work in partials(directory):
        if (work / PACKAGE).exists():
            continue
        with contextlib.suppress(OSError):
            fd = lock(work)
            if fd is not None:
                shutil.rmtree(work, ignore_errors=True)
                os.close(fd)
