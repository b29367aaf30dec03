"""The disk's live section ``toy-disk``: geometry, then chunks in rounds.

Payload of every section: records, each with a type byte: 0 ends the payload, 1 geometry (be64
length, be32 chunk bytes), 2 a chunk (be32 index, its bytes), 3 a chunk of zeros (be32 index).
START has the geometry, PART and END have chunks.
"""

from __future__ import annotations

from migration.wire.errors import RemoteStreamError
from migration.wire.io import Reader, Writer
from migration.wire.vmstate import PendingEstimate

from .disk import CHUNK_BYTES, Disk

_END, _GEOMETRY, _CHUNK, _ZERO_CHUNK = range(4)
_ZEROS = bytes(CHUNK_BYTES)


class DiskMigration:
    """:class:`migration.wire.vmstate.LiveStateHandler` for a :class:`Disk`.

    :ivar chunks_sent: of the current or latest migration, repeats included.
    """

    idstr = "toy-disk"
    instance_id = 0
    version_id = 1
    minimum_version_id = 1
    has_postcopy = False

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.chunks_sent = 0

    def is_active(self) -> bool:
        """Always: what the file holds is not shared with the destination."""
        return True

    def save_setup(self, writer: Writer) -> None:
        """Geometry; from here on everything is dirty."""
        self.chunks_sent = 0
        self.disk.dirty.fill()
        writer.write(bytes([_GEOMETRY]) + self.disk.length.to_bytes(8, "big"))
        writer.write(CHUNK_BYTES.to_bytes(4, "big") + bytes([_END]))

    def save_iterate(self, writer: Writer, budget_bytes: int) -> bool:
        """Dirty chunks, at least one if there is any."""
        left = budget_bytes
        while True:
            index = self.disk.dirty.next_set()
            if index >= self.disk.chunk_count:
                break
            left -= self._send(writer, index)
            if left <= 0:
                break
        writer.write(bytes([_END]))
        return self.disk.dirty.next_set() >= self.disk.chunk_count

    def pending(self, *, exact: bool) -> PendingEstimate:
        """Dirty chunks; the count is exact at any time and costs nothing."""
        return PendingEstimate(precopy_bytes=self.disk.dirty.count() * CHUNK_BYTES)

    def save_complete(self, writer: Writer) -> None:
        """All that is left; the guest stands still."""
        for index in range(self.disk.chunk_count):
            if self.disk.dirty.test(index):
                self._send(writer, index)
        writer.write(bytes([_END]))

    def _send(self, writer: Writer, index: int) -> int:
        data = self.disk.take_dirty(index)
        is_zero = data == _ZEROS
        record = bytes([_ZERO_CHUNK if is_zero else _CHUNK]) + index.to_bytes(4, "big")
        writer.write(record if is_zero else record + data)
        self.chunks_sent += 1
        return len(record) + (0 if is_zero else len(data))

    def save_cleanup(self) -> None:
        """Nothing was taken but the dirty map, which the next set-up fills anew."""

    def load_setup(self) -> None:
        """The disk is there already."""

    def load(self, reader: Reader, version_id: int) -> None:
        """One payload.

        :raises RemoteStreamError: another geometry, a chunk that does not exist, an unknown record.
        :raises DiskError: the disk cannot be written.
        """
        while (kind := reader.read(1)[0]) != _END:
            at = reader.position - 1
            if kind == _GEOMETRY:
                self._check_geometry(reader, at)
            elif kind in (_CHUNK, _ZERO_CHUNK):
                self._load_chunk(reader, at, is_zero=kind == _ZERO_CHUNK)
            else:
                raise RemoteStreamError(f"unknown record {kind}", offset=at, section=self.idstr)

    def _check_geometry(self, reader: Reader, at: int) -> None:
        length = int.from_bytes(reader.read(8), "big")
        chunk = int.from_bytes(reader.read(4), "big")
        if (length, chunk) != (self.disk.length, CHUNK_BYTES):
            raise RemoteStreamError(
                f"a disk of {length} bytes in chunks of {chunk}, here {self.disk.length} in "
                f"chunks of {CHUNK_BYTES}: give both sides the same disk",
                offset=at,
                section=self.idstr,
            )

    def _load_chunk(self, reader: Reader, at: int, *, is_zero: bool) -> None:
        index = int.from_bytes(reader.read(4), "big")
        if index >= self.disk.chunk_count:
            raise RemoteStreamError(
                f"chunk {index} of {self.disk.chunk_count}", offset=at, section=self.idstr
            )
        self.disk.write_chunk(index, _ZEROS if is_zero else reader.read(CHUNK_BYTES))

    def load_cleanup(self) -> None:
        """Nothing was taken."""
