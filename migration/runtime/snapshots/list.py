"""The snapshots in a directory: what is there, and taking one away."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from . import manifest as manifests
from .files import STREAM_SUFFIX, Location, SnapshotError, locked, names_in
from .manifest import Manifest


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One snapshot in the directory.

    :ivar file_bytes: length of its file. :ivar disk_bytes: what it takes on disk.
    :ivar manifest: None: there is none, or it is damaged.
    """

    name: str
    file_bytes: int
    disk_bytes: int
    modified_s: int
    manifest: Manifest | None

    def as_json(self) -> dict[str, object]:
        """For QMP."""
        known: dict[str, object] = {
            "name": self.name,
            "vm-state-size": self.file_bytes,
            "disk-size": self.disk_bytes,
            "date-sec": self.manifest.created_s if self.manifest else self.modified_s,
            "is-verifiable": self.manifest is not None,
        }
        if self.manifest is not None:
            known["machine"] = self.manifest.machine
            known["run-state"] = self.manifest.run_state
            known["layout"] = self.manifest.layout
            if self.manifest.guest_clock_ns is not None:
                known["vm-clock-nsec"] = self.manifest.guest_clock_ns
        return known


def list_directory(directory: Path) -> list[SnapshotInfo]:
    """All of them, by name. :raises SnapshotError: the directory cannot be read."""
    found = (_info(directory, name) for name in names_in(directory))
    return [info for info in found if info is not None]


def _info(directory: Path, name: str) -> SnapshotInfo | None:
    location = Location(name, directory / (name + STREAM_SUFFIX), is_internal=True)
    try:
        status = os.stat(location.path)
    except OSError:  # deleted meanwhile
        return None
    manifest = None
    with contextlib.suppress(SnapshotError):
        manifest = manifests.read(location.manifest_path)
    return SnapshotInfo(
        name, status.st_size, status.st_blocks * 512, int(status.st_mtime), manifest
    )


def delete(location: Location) -> None:
    """Remove a named snapshot. :raises SnapshotError: there is none, or it is a ``file:``."""
    if not location.is_internal:
        raise SnapshotError(
            "only snapshots in the snapshot directory are deleted: remove files yourself"
        )
    try:
        with locked(location.path.parent, exclusive=True) as directory_fd:
            os.unlink(location.path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(location.manifest_path)
            os.fsync(directory_fd)
    except FileNotFoundError:
        raise SnapshotError(f"there is no snapshot {location.label!r}") from None
    except OSError as error:
        raise SnapshotError(f"deleting snapshot {location.label!r}: {error.strerror}") from None
