"""What a snapshot's stream should be, kept beside it: whoever loads it compares before touching the
guest.

A stream without manifest (one a QEMU wrote, or ``migrate file:``) is loaded all the same; then only
the loading itself shows damage.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from guestmem.geometry import TARGET_PAGE_BYTES, align_down
from migration.native import ffi, lib
from migration.wire.registry import StateRegistry

from ..machine import Machine
from .files import SnapshotError, data_extents

FORMAT = "postcopy-snapshot-1"
MANIFEST_BYTES_MAX = 16 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a snapshot but its bytes.

    :ivar machine: machine type. :ivar run_state: what the guest was in.
    :ivar layout: ``stream`` or ``mapped-ram``.
    :ivar offset: of the stream in its file. :ivar length: of the stream, bytes.
    :ivar crc32c: see :func:`checksum`.
    :ivar blocks: (name, bytes) of each RAM block.
    :ivar devices: (name, instance, version) of each device section.
    :ivar created_s: when, seconds since 1970. :ivar guest_clock_ns: how long the guest had run.
    """

    machine: str
    run_state: str
    layout: str
    offset: int
    length: int
    crc32c: int
    blocks: tuple[tuple[str, int], ...]
    devices: tuple[tuple[str, int, int], ...]
    created_s: int
    guest_clock_ns: int | None = None
    format: str = FORMAT

    def to_json(self) -> str:
        """The manifest file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def survey(machine: Machine, *, run_state: str, layout: str, offset: int) -> Manifest:
    """The manifest of a standing machine, as far as it is known before its stream is measured.

    :param run_state: what the guest was in before it was stopped for this.
    """
    return Manifest(
        machine=machine.machine_type,
        run_state=run_state,
        layout=layout,
        offset=offset,
        length=0,
        crc32c=0,
        blocks=tuple((block.idstr, block.used_length) for block in machine.ram),
        devices=tuple(_devices(machine.registry)),
        created_s=int(time.time()),
        guest_clock_ns=_guest_clock_ns(machine.registry),
    )


def measured(manifest: Manifest, fd: int) -> Manifest:
    """``manifest`` with length and checksum of the stream, which ends where the file does.

    :raises OSError: it cannot be read back.
    """
    length = os.fstat(fd).st_size - manifest.offset
    return replace(manifest, length=length, crc32c=checksum(fd, manifest.offset, length))


def _devices(registry: StateRegistry) -> list[tuple[str, int, int]]:
    needed = [entry for entry in registry if entry.is_needed]
    return [(entry.idstr, entry.instance_id, entry.version_id) for entry in needed]


def _guest_clock_ns(registry: StateRegistry) -> int | None:
    """The virtual clock, which QEMU and the toy VM both keep in section ``timer``."""
    entry = registry.find("timer", 0)
    value = getattr(entry.obj, "cpu_clock_offset", None) if entry is not None else None
    return value if isinstance(value, int) else None


def read(path: Path) -> Manifest | None:
    """The manifest at ``path``; None when there is none.

    :raises SnapshotError: there is something else.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MANIFEST_BYTES_MAX)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror}") from None
    try:
        return _decode(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{path} is no snapshot's manifest, or damaged: {error}") from None


def _decode(data: Any) -> Manifest:
    if data.get("format") != FORMAT:
        raise ValueError(f"format {data.get('format')!r}, not {FORMAT!r}")
    data["blocks"] = tuple((str(name), int(length)) for name, length in data["blocks"])
    data["devices"] = tuple((str(n), int(i), int(v)) for n, i, v in data["devices"])
    manifest = Manifest(**data)
    numbers = (manifest.offset, manifest.length, manifest.crc32c, manifest.created_s)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a number is missing or negative")
    return manifest


def verify(manifest: Manifest, fd: int, *, offset: int, label: str) -> None:
    """The stream at ``offset`` is the one that was written, to the last byte.

    :raises SnapshotError: it is not. :raises OSError: it cannot be read.
    """
    size = os.fstat(fd).st_size - offset
    if size < manifest.length:
        raise SnapshotError(
            f"snapshot {label!r} is cut short: {size} of {manifest.length} bytes are there"
        )
    if checksum(fd, offset, manifest.length) != manifest.crc32c:
        raise SnapshotError(f"snapshot {label!r} is damaged: its checksum is wrong")


def check_machine(manifest: Manifest, machine: Machine, label: str) -> None:
    """This machine is of the kind that was saved.

    :raises SnapshotError: another type, RAM, or device; names it.
    """
    if not machine.machine_type.startswith(manifest.machine):
        raise SnapshotError(
            f"snapshot {label!r} is of a machine {manifest.machine!r}, "
            f"this is a {machine.machine_type!r}"
        )
    here = {block.idstr: block.used_length for block in machine.ram}
    if here != dict(manifest.blocks):
        raise SnapshotError(
            f"snapshot {label!r} has RAM {_sizes(dict(manifest.blocks))}, here it is {_sizes(here)}"
        )
    for idstr, instance_id, version_id in manifest.devices:
        entry = machine.registry.find(idstr, instance_id)
        if entry is None:
            raise SnapshotError(
                f"snapshot {label!r} has a device {idstr!r} ({instance_id}), this machine has not"
            )
        if not entry.oldest_version_id <= version_id <= entry.version_id:
            raise SnapshotError(
                f"snapshot {label!r} has version {version_id} of device {idstr!r}, known here are "
                f"{entry.oldest_version_id} to {entry.version_id}"
            )


def _sizes(blocks: dict[str, int]) -> str:
    return ", ".join(f"{name} {length >> 10} KiB" for name, length in blocks.items())


def checksum(fd: int, offset: int, length: int) -> int:
    """CRC-32C over (place, bytes) of every target page of the stream that is not zero, the last one
    filled up with zeros: a hole and written zeros count the same, so copying the file with or
    without its holes keeps it. A page's place counts from the start of the stream.

    :raises OSError: the file cannot be read.
    """
    crc, done = 0, 0
    for start, end in data_extents(fd, offset + length, offset):
        first = max(done, align_down(start - offset, TARGET_PAGE_BYTES))
        for at in range(first, end - offset, _CHUNK_BYTES):
            data = os.pread(fd, min(_CHUNK_BYTES, length - at), offset + at)
            data += bytes(-len(data) % TARGET_PAGE_BYTES)
            # The function adds the place to the address it is given.
            base = int(ffi.cast("uintptr_t", ffi.from_buffer(data))) - at
            crc = int(lib.crc32c_pages(ffi.cast("void *", base), at, at + len(data), crc))
            done = at + len(data)
    return crc
