"""Where snapshots lie, and how a file comes to be there whole or not at all.

    DIR/NAME.vmstate        the stream, nothing else: any QEMU of the same machine type can load it
    DIR/NAME.vmstate.json   what is in it, and its checksum (:mod:`.manifest`)

A new stream is written to a file without a name (``O_TMPFILE``, open(2)), synced, and then put in
the old one's place by rename(2). Whoever is interrupted leaves the old snapshot, or none; where the
file system has no nameless files, a ``.partial-`` file may stay, which the next save removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import MigrationError
from ..transport import split_offset

STREAM_SUFFIX = ".vmstate"
MANIFEST_SUFFIX = ".json"
NAME_BYTES_MAX = 200
_NAME = re.compile(r"[^\W_][\w.+@-]*")
_PARTIAL = ".partial-"
_NO_NAMELESS = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT})
_COPY_BYTES = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class SnapshotError(MigrationError):
    """A snapshot that cannot be saved, loaded or deleted; says why and what the guest does now."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where one snapshot lies.

    :ivar label: what the user called it. :ivar path: the stream's file.
    :ivar offset: bytes in front of the stream that are somebody else's.
    :ivar is_internal: it was named, and lies in the snapshot directory.
    """

    label: str
    path: Path
    offset: int = 0
    is_internal: bool = False

    @property
    def manifest_path(self) -> Path:
        """The file beside it that says what is in it."""
        return self.path.with_name(self.path.name + MANIFEST_SUFFIX)


def locate(name: str, directory: Path | None) -> Location:
    """``file:PATH[,offset=N]``, or a name in the snapshot directory.

    :raises SnapshotError: no such form, no directory, or a name that could lead out of it.
    """
    if name.startswith("file:"):
        path, offset = split_offset(name.removeprefix("file:"), name)
        if not path:
            raise SnapshotError(f"{name}: no path")
        return Location(name, Path(path), offset)
    if not _NAME.fullmatch(name) or len(name.encode()) > NAME_BYTES_MAX:
        raise SnapshotError(
            f"{name!r} is no snapshot name: a letter or digit, then letters, digits and _ . + @ -, "
            f"at most {NAME_BYTES_MAX} bytes; or file:PATH[,offset=N]"
        )
    if directory is None:
        raise SnapshotError(
            "there is no snapshot directory: start the VM with --snapshot-dir DIR, or use "
            "file:PATH[,offset=N]"
        )
    return Location(name, directory / (name + STREAM_SUFFIX), is_internal=True)


def names_in(directory: Path) -> list[str]:
    """Names of the snapshots in a directory, sorted. :raises SnapshotError: it cannot be read."""
    try:
        found = [entry.name for entry in os.scandir(directory) if entry.is_file()]
    except OSError as error:
        raise SnapshotError(f"{directory}: {error.strerror}") from None
    names = (name.removesuffix(STREAM_SUFFIX) for name in found if name.endswith(STREAM_SUFFIX))
    return sorted(name for name in names if _NAME.fullmatch(name))


@contextmanager
def locked(directory: Path, *, exclusive: bool) -> Iterator[int]:
    """The directory, open, while nobody else puts snapshots into it; its descriptor."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield fd
    finally:
        os.close(fd)


def open_stream(location: Location) -> int:
    """A descriptor to read the stream from. :raises SnapshotError: it cannot be had."""
    # A name stands for a file in the directory, not for what a link there points to.
    follow = os.O_NOFOLLOW if location.is_internal else 0
    try:
        fd = os.open(location.path, os.O_RDONLY | os.O_CLOEXEC | follow)
    except FileNotFoundError:
        raise SnapshotError(f"there is no snapshot {location.label!r}") from None
    except OSError as error:
        raise SnapshotError(f"snapshot {location.label!r}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SnapshotError(f"snapshot {location.label!r} is no regular file")
    return fd


class NewFile:
    """A file in the making in the place of ``path``. :meth:`publish` or :meth:`discard` ends it.

    :ivar fd: to write to, at any offset.
    :raises OSError: it cannot be made there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory = path.parent
        self._temporary: Path | None = None
        self.fd = self._open()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(self._directory, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in _NO_NAMELESS or not self._directory.is_dir():
                raise
        self._remove_leftovers()
        name = self._directory / self._unused_name()
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
        self._temporary = name
        fcntl.flock(fd, fcntl.LOCK_EX)  # says that somebody is still writing it
        return fd

    def _unused_name(self) -> str:
        return f".{self.path.name}{_PARTIAL}{secrets.token_hex(8)}"

    def _remove_leftovers(self) -> None:
        """Files of writers that died: nobody holds their lock."""
        for old in self._directory.glob(f".{self.path.name}{_PARTIAL}*"):
            with contextlib.suppress(OSError), open(old, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                old.unlink()

    def sync(self) -> None:
        """All contents are on disk. :raises OSError: they are not."""
        os.fsync(self.fd)

    def publish(self, directory_fd: int) -> None:
        """Give it its name, in one step, in place of whatever has it; on disk when this returns.

        :param directory_fd: of the path's directory.
        """
        if self._temporary is None:
            name = self._directory / self._unused_name()
            # linkat(2) with AT_SYMLINK_FOLLOW, which Python only calls given a directory.
            os.link(f"/proc/self/fd/{self.fd}", name, src_dir_fd=directory_fd, follow_symlinks=True)
            self._temporary = name
        os.rename(self._temporary, self.path)
        self._temporary = None
        os.fsync(directory_fd)
        self.close()

    def discard(self) -> None:
        """Leave nothing. Harmless after :meth:`publish`."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None
        self.close()

    def close(self) -> None:
        """Close the descriptor. Harmless the second time."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def copy_front(path: Path, fd: int, length: int) -> None:
    """The first ``length`` bytes of the file at ``path`` (if there is one) into ``fd``; holes stay.

    :raises OSError: one cannot be read, or the other not be written.
    """
    os.ftruncate(fd, length)
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for start, end in data_extents(source, min(length, os.fstat(source).st_size)):
            for at in range(start, end, _COPY_BYTES):
                data = os.pread(source, min(_COPY_BYTES, end - at), at)
                write_at(fd, data, at)
    finally:
        os.close(source)


def write_at(fd: int, data: bytes | memoryview, position: int) -> None:
    """All of ``data`` at ``position``. :raises OSError: pwrite(2) failed."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, position)
        view, position = view[count:], position + count


def data_extents(fd: int, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """``(start, end)`` of what a sparse file really holds in ``[start, end)``; the rest is zero."""
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if data >= end:
            return
        start = min(end, os.lseek(fd, data, os.SEEK_HOLE))
        yield data, start


def is_full(code: int) -> bool:
    """Whether an errno says that there is no room (disk, quota or file size limit)."""
    return code in _FULL


def no_room(path: Path) -> str:
    """The sentence for it."""
    try:
        free = os.statvfs(path.parent)
        room = f" ({free.f_bavail * free.f_frsize >> 20} MiB are free)"
    except OSError:
        room = ""
    return f"the disk of {path.parent} is full{room}; make room, or save elsewhere"
