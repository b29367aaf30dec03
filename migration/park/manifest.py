"""A parked VM on disk: a directory with a file per RAM block, the device state, and this manifest.

    DIR/manifest.json   what is here, JSON, format 1 (below)
    DIR/devices.bin     payloads of the device sections, back to back, in stream order
    DIR/devices.json    the source's description of their fields, when it came (precopy)
    DIR/ram-N.bin       block N, sparse: a hole is zero; mappable as it is

The directory is written under another name, synced, and renamed: one that is there under its own
name is whole. The manifest is replaced the same way: ``state`` says at any time who has the guest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
DEVICES = "devices.bin"
DESCRIPTION = "devices.json"


class ParkedState(StrEnum):
    """Who has the guest."""

    PARKED = "parked"
    UNCONFIRMED = "unconfirmed"
    """Complete, but it is not known that the source was told: it may have kept its guest."""
    GIVING = "giving"
    """A destination may have it: an unpark passed its commit point, or died near it."""
    GIVEN = "given"


class ParkError(Exception):
    """A parked VM that is damaged, or not in the state for what was asked."""


@dataclass(frozen=True, slots=True)
class ParkedBlock:
    """One RAM block: its file, and its host page size at the source (bytes)."""

    idstr: str
    used_length: int
    page_size: int
    file: str
    crc32c: int


@dataclass(frozen=True, slots=True)
class ParkedDevice:
    """One device section: where its payload lies in ``devices.bin`` (bytes)."""

    idstr: str
    instance_id: int
    version_id: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a parked VM but its bytes.

    :ivar machine: machine type on the wire. :ivar uuid: of the VM, if the stream named one.
    :ivar run_state: what the guest was in before the source stopped it.
    :ivar origin: ``precopy``, ``postcopy`` or ``file``. :ivar peer: where it came from.
    :ivar block_devices: device sections that look like disks: they are not parked with the VM.
    :ivar clones: how often it was given with ``--clone``.
    :ivar features: extensions in force with the destination it was given to: to resume there.
    """

    machine: str
    run_state: str
    origin: str
    peer: str
    blocks: tuple[ParkedBlock, ...]
    devices: tuple[ParkedDevice, ...]
    devices_crc32c: int
    block_devices: tuple[str, ...] = ()
    uuid: str | None = None
    state: ParkedState = ParkedState.PARKED
    clones: int = 0
    features: int = 0
    history: tuple[str, ...] = field(default=())
    format: int = FORMAT

    def to_json(self) -> str:
        """The manifest file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def ram_bytes(self) -> int:
        """Length of all blocks together."""
        return sum(block.used_length for block in self.blocks)


def load(directory: Path) -> Manifest:
    """:raises ParkError: not a parked VM, or a manifest that does not add up."""
    path = directory / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        manifest = _decode(data)
    except (FileNotFoundError, NotADirectoryError):
        raise ParkError(f"{directory} is no parked VM: no {MANIFEST} in it") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ParkError(f"{path} is damaged: {error}") from None
    _check(directory, manifest)
    return manifest


def _decode(data: Any) -> Manifest:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}, this version knows {FORMAT}")
    data["blocks"] = tuple(ParkedBlock(**block) for block in data["blocks"])
    data["devices"] = tuple(ParkedDevice(**device) for device in data["devices"])
    data["state"] = ParkedState(data["state"])
    for name in ("block_devices", "history"):
        data[name] = tuple(data[name])
    manifest = Manifest(**data)
    if manifest.uuid is not None:
        uuid.UUID(manifest.uuid)
    return manifest


def _check(directory: Path, manifest: Manifest) -> None:
    """Every file is there and long enough, and no name leads out of the directory."""
    for block in manifest.blocks:
        if Path(block.file).name != block.file:
            raise ParkError(f"{directory}: block {block.idstr!r} lies in {block.file!r}")
        _check_length(directory / block.file, block.used_length)
    end = max((device.offset + device.length for device in manifest.devices), default=0)
    _check_length(directory / DEVICES, end)


def _check_length(path: Path, length: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ParkError(f"{path}: {error.strerror}") from None
    if size < length:
        raise ParkError(f"{path} has {size} bytes, the manifest says {length}")


def sync_directory(path: Path) -> None:
    """fsync(2) of a directory: the names in it are on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def store(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest, crash-safely."""
    temporary = directory / f".{MANIFEST}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / MANIFEST)
    sync_directory(directory)


def change_state(directory: Path, state: ParkedState, why: str, *, features: int = 0) -> Manifest:
    """Enter ``state`` on disk; returns the new manifest."""
    with _updating(directory) as manifest:
        history = (*manifest.history, f"{state.value}: {why}")
        changed = replace(manifest, state=state, history=history, features=features)
        store(directory, changed)
    return changed


def count_clone(directory: Path, why: str) -> Manifest:
    """Note on disk that a copy was given; returns the new manifest."""
    with _updating(directory) as manifest:
        history = (*manifest.history, f"cloned: {why}")
        changed = replace(manifest, clones=manifest.clones + 1, history=history)
        store(directory, changed)
    return changed


@contextlib.contextmanager
def _updating(directory: Path) -> Iterator[Manifest]:
    """The manifest as it is on disk now, which nobody else changes meanwhile: clones and the guest
    itself are given by different processes, and none may write back what it read long ago."""
    load(directory)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield load(directory)
    finally:
        os.close(fd)


def load_settled(directory: Path) -> Manifest:
    """As :func:`load`, but a process that still parks it is waited for: its source has the
    directory's name before this process knows that the source was told.

    :raises ParkError: as :func:`load`.
    """
    with _updating(directory) as manifest:
        return manifest


def hold_guest(directory: Path) -> int:
    """A descriptor that keeps other processes from giving this guest away: two that both found it
    parked would make two of it. Not for clones. On a file that is never replaced.

    :raises ParkError: another process has it.
    """
    try:
        fd = os.open(directory / DEVICES, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ParkError(f"{directory / DEVICES}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ParkError(
            f"{directory}: another process is giving this guest away; see how it ends, or start a "
            "copy with --clone"
        ) from None
    return fd
