"""A block disk with live state: sent in chunks while the guest runs, dirty chunks again.

The guest's driver rewrites whole chunks, each with a generation number; the generations are device
state, so a chunk that was lost, mixed up or rolled back on the way is found by :meth:`Disk.sweep`.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import zlib

from guestmem import Bitmap
from migration.wire.compat import Property
from migration.wire.vmstate import (
    U64,
    String,
    U32Equal,
    VArray,
    VMStateDescription,
)
from migration.wire.vmstate import Bitmap as BitmapField

CHUNK_BYTES = 64 << 10
_HEADER = struct.Struct("<QQQI4x")
_MAGIC = 0x746F792D6469736B
LABEL_MAX = 64
DEFAULT_LABEL = "toy disk"


class DiskError(OSError):
    """The file behind a disk cannot be read or written."""


class Disk:
    """Chunks of :data:`CHUNK_BYTES`, in a file or in memory; thread-safe.

    :ivar chunk_count: chunks. :ivar generations: how often each was rewritten; 0 reads as zeros.
    :ivar dirty: chunks rewritten since a migration last took them, a bit each.
    :ivar sends_label: the label travels too (machine types from toy-1.1 on).
    """

    device_type = "toy-disk-state"
    properties = {"x-label": Property("sends_label")}  # noqa: RUF012 - a constant of the class

    def __init__(self, length: int, *, seed: int, path: str | None = None) -> None:
        """:raises ValueError: not whole chunks. :raises DiskError: the file cannot be had."""
        if length <= 0 or length % CHUNK_BYTES:
            raise ValueError(f"a disk of {length} bytes: whole chunks of {CHUNK_BYTES} please")
        self.chunk_count = length // CHUNK_BYTES
        self.generations = [0] * self.chunk_count
        self.written = 0
        self.label = DEFAULT_LABEL
        self.sends_label = True
        self.dirty = Bitmap(self.chunk_count)
        self._seed = seed
        self._lock = threading.Lock()
        try:
            if path is None:
                self._fd = os.memfd_create("toy-disk", os.MFD_CLOEXEC)
            else:
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._fd, length)
        except OSError as error:
            raise DiskError(error.errno, error.strerror, path) from error

    @property
    def length(self) -> int:
        """Bytes."""
        return self.chunk_count * CHUNK_BYTES

    def read_chunk(self, index: int) -> bytes:
        """One chunk as it is. :raises DiskError: the file is broken or too short."""
        data = os.pread(self._fd, CHUNK_BYTES, index * CHUNK_BYTES)
        if len(data) != CHUNK_BYTES:
            raise DiskError(errno.EIO, f"chunk {index} is cut short")
        return data

    def write_chunk(self, index: int, data: bytes) -> None:
        """Replace one chunk. :raises DiskError: the file is full or broken."""
        if len(data) != CHUNK_BYTES or not 0 <= index < self.chunk_count:
            raise ValueError(f"chunk {index} of {len(data)} bytes")
        done = os.pwrite(self._fd, data, index * CHUNK_BYTES)
        if done != CHUNK_BYTES:
            raise DiskError(errno.ENOSPC, f"chunk {index}: {done} bytes written")

    def rewrite(self, index: int) -> None:
        """The guest writes a chunk: its next generation."""
        with self._lock:
            generation = self.generations[index] + 1
            self.write_chunk(index, self._contents(index, generation))
            self.generations[index] = generation
            self.written |= 1 << index
            self.dirty.set_atomic(index, 1)

    def take_dirty(self, index: int) -> bytes:
        """A chunk's contents, no longer dirty; a rewrite comes entirely before or after."""
        with self._lock:
            self.dirty.clear(index, 1)
            return self.read_chunk(index)

    def sweep(self) -> list[int]:
        """Chunks that do not hold what their generation says."""
        return [
            index
            for index, generation in enumerate(self.generations)
            if self.read_chunk(index) != self._contents(index, generation)
        ]

    def _contents(self, index: int, generation: int) -> bytes:
        if generation == 0:
            return bytes(CHUNK_BYTES)
        head = _HEADER.pack(_MAGIC ^ index, generation, self._seed, 0)
        block = head[:-8] + struct.pack("<I4x", zlib.crc32(head))
        return block * (CHUNK_BYTES // len(block))

    def close(self) -> None:
        """Close the file (which stays). Harmless the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _pre_load(disk: Disk) -> None:
    disk.label = DEFAULT_LABEL  # a machine before toy-1.1 sends none


def _generations_fit(disk: Disk, version_id: int) -> None:
    untouched = [index for index, generation in enumerate(disk.generations) if generation == 0]
    if any(disk.written >> index & 1 for index in untouched) or disk.written >> disk.chunk_count:
        raise ValueError("the map of written chunks does not fit the generations")


LABEL = VMStateDescription(
    name="toy-disk-state/label",
    version_id=1,
    minimum_version_id=1,
    needed=lambda disk: bool(disk.sends_label),
    fields=(String("label", limit=LABEL_MAX),),
)

DISK = VMStateDescription(
    name="toy-disk-state",
    version_id=1,
    minimum_version_id=1,
    pre_load=_pre_load,
    post_load=_generations_fit,
    fields=(
        U32Equal.with_hint("the disk's size must be the same on both sides")("chunk_count"),
        VArray("generations", count="chunk_count", element=U64),
        BitmapField("written", nbits="chunk_count"),
    ),
    subsections=(LABEL,),
)
