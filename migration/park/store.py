"""Writing a parked VM: files under another name first, its own name only when all is on disk."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from guestmem.geometry import TARGET_PAGE_BYTES, align_down, align_up
from migration.native import crc32c, crc32c_pages
from migration.wire.ram_setup import RamSetup

from .keeper import Package
from .manifest import (
    DESCRIPTION,
    DEVICES,
    MANIFEST,
    Manifest,
    ParkedBlock,
    ParkedState,
    ParkError,
    store,
    sync_directory,
)
from .partial import (
    PACKAGE,
    PartialBlock,
    lay_out,
    lock,
    remove_leftovers,
    save_package,
    write_file,
)
from .sections import OpaqueSection, block_devices_of, run_state_of
from .serve import view_memfd

_CHECKSUM_BYTES = 32 << 20


@dataclass(slots=True)
class BlockFile:
    """A RAM block being written: pages go to ``fd``, which is the file ``name``, or memory that
    goes there in the end."""

    idstr: str
    used_length: int
    page_size: int
    name: str
    fd: int
    is_memory: bool = False


class ParkWriter:
    """A parked VM in the making. :meth:`finish` gives it its name; :meth:`discard` leaves nothing.

    :ivar work: the partial directory (:mod:`.partial`).
    """

    def __init__(self, directory: Path, *, in_memory: bool = False) -> None:
        """:param in_memory: keep RAM in memory files until it is whole.
        :raises ParkError: the directory exists already, or cannot be made."""
        self._take(directory, in_memory)
        remove_leftovers(directory)
        try:
            self.work = Path(
                tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent)
            )
        except OSError as error:
            raise ParkError(f"cannot write in {directory.parent}: {error.strerror}") from None
        self._lock = lock(self.work)

    @classmethod
    def reopen(
        cls, directory: Path, work: Path, blocks: list[PartialBlock], *, in_memory: bool = False
    ) -> ParkWriter:
        """Go on with what another process left. Its pages are forgotten: nobody knows which of
        them are whole.

        :raises ParkError: another process still writes it. :raises OSError: a file is missing.
        """
        writer = cls.__new__(cls)
        writer._take(directory, in_memory)
        writer.work = work
        writer._lock = lock(work)
        if writer._lock is None:
            raise ParkError(f"{work}: another process takes this VM in")
        for block in blocks:
            writer._add_block(block.idstr, block.used_length, block.page_size, block.file)
        return writer

    def _take(self, directory: Path, in_memory: bool) -> None:
        if directory.exists():
            raise ParkError(f"{directory} exists already: choose another name, or remove it")
        self.directory = directory
        self._in_memory = in_memory
        self.blocks: list[BlockFile] = []

    @property
    def is_resumable(self) -> bool:
        """Device state is on disk: the guest must not be thrown away any more."""
        return (self.work / PACKAGE).exists()

    def add_blocks(self, setup: RamSetup) -> None:
        """Make the files; sparse, at full length."""
        for index, block in enumerate(setup.blocks):
            page_size = block.page_size or TARGET_PAGE_BYTES
            self._add_block(block.idstr, block.used_length, page_size, f"ram-{index}.bin")

    def _add_block(self, idstr: str, used_length: int, page_size: int, name: str) -> None:
        if self._in_memory:
            fd = view_memfd(idstr, used_length)
        else:
            fd = _empty_file(self.work / name, used_length)
        self.blocks.append(BlockFile(idstr, used_length, page_size, name, fd, self._in_memory))

    def keep_package(self, package: Package) -> None:
        """From now on the device state survives this process. :raises OSError: it does not."""
        files = [PartialBlock(b.idstr, b.used_length, b.page_size, b.name) for b in self.blocks]
        save_package(self.work, package, files)

    def finish(
        self,
        *,
        machine: str,
        uuid: str | None,
        sections: list[OpaqueSection],
        origin: str,
        peer: str,
        description: bytes = b"",
        is_certain: bool = True,
    ) -> Manifest:
        """Write devices and manifest, sync everything, and rename. After this it is parked.

        :param description: the stream's own description of its devices (JSON), if it had one.
        :param is_certain: nobody else has the guest. Else it is ``unconfirmed``, and locked, until
            :meth:`confirm`.
        :raises OSError: the disk is full or fails; nothing is left under the final name, and it may
            be tried again.
        """
        devices, payload = lay_out(sections)
        if not self.is_resumable:
            write_file(self.work, DEVICES, payload)
        if description:
            write_file(self.work, DESCRIPTION, description)
        state = ParkedState.PARKED if is_certain else ParkedState.UNCONFIRMED
        manifest = Manifest(
            machine=machine,
            uuid=uuid,
            run_state=run_state_of(sections),
            origin=origin,
            peer=peer,
            blocks=tuple(self._seal(block) for block in self.blocks),
            devices=devices,
            devices_crc32c=crc32c(payload),
            block_devices=block_devices_of(sections),
            state=state,
            history=(f"{state.value}: from {peer}",),
        )
        write_file(self.work, MANIFEST, manifest.to_json().encode())
        _rename_new(self.work, self.directory)
        sync_directory(self.directory.parent)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.directory / PACKAGE)
        if is_certain:
            self.close()
        return manifest

    def confirm(self, manifest: Manifest) -> Manifest:
        """The source knows that its guest is here: it is parked. Returns the new manifest.

        :raises OSError: that cannot be written.
        """
        history = (*manifest.history, "parked: the source was told")
        confirmed = replace(manifest, state=ParkedState.PARKED, history=history)
        store(self.directory, confirmed)
        self.close()
        return confirmed

    def _seal(self, block: BlockFile) -> ParkedBlock:
        if block.is_memory:
            fd = _empty_file(self.work / block.name, block.used_length)
            try:
                _copy_data(block.fd, fd, block.used_length)
                os.fsync(fd)
            finally:
                os.close(fd)
        else:
            os.fsync(block.fd)
        return ParkedBlock(
            block.idstr,
            block.used_length,
            block.page_size,
            block.name,
            checksum(block.fd, block.used_length),
        )

    def close(self) -> None:
        """Close the files; what is on disk stays."""
        for block in self.blocks:
            os.close(block.fd)
        self.blocks = []
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove everything written; harmless after :meth:`finish`."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.close()


def _empty_file(path: Path, used_length: int) -> int:
    """A new sparse file of whole pages; one that was there is emptied."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    os.ftruncate(fd, align_up(used_length, TARGET_PAGE_BYTES))
    return fd


def _copy_data(from_fd: int, to_fd: int, length: int) -> None:
    """What is in a sparse file to the same places of another. :raises OSError: the disk is full."""
    for start, end in data_extents(from_fd, length):
        os.lseek(to_fd, start, os.SEEK_SET)
        while start < end:
            start += os.sendfile(to_fd, from_fd, start, end - start)


def _rename_new(old: Path, new: Path) -> None:
    """rename(2) that never replaces: somebody may have made the directory meanwhile."""
    if new.exists():
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    os.rename(old, new)


def data_extents(fd: int, length: int) -> Iterator[tuple[int, int]]:
    """``(start, end)`` of what a sparse file really holds, bytes; the rest is zero."""
    at = 0
    while at < length:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = min(length, os.lseek(fd, start, os.SEEK_HOLE))
        if start >= length:
            return
        yield start, end
        at = end


def checksum(fd: int, length: int) -> int:
    """CRC-32C over (offset, bytes) of every target page that is not zero; a hole and written zeros
    count the same, so copying the file with or without its sparseness keeps it.

    :param length: bytes of the block; a part page at its end is summed with zeros behind it.
    """
    crc = 0
    mapped = align_up(length, TARGET_PAGE_BYTES)
    # A mapping may reach past the end of the file within its last page.
    with mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        for start, end in data_extents(fd, length):
            first = align_down(start, TARGET_PAGE_BYTES)
            last = min(align_up(end, TARGET_PAGE_BYTES), align_down(mapped, TARGET_PAGE_BYTES))
            for at in range(first, last, _CHECKSUM_BYTES):
                until = min(at + _CHECKSUM_BYTES, last)
                crc = crc32c_pages(view, at, until, crc)
                # The kernel keeps what it has read; we need it no longer.
                view.madvise(mmap.MADV_DONTNEED, at, min(until, length) - at)
    return crc
