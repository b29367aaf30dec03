"""A mapped-ram snapshot looked at in place: by page, or mapped as memory, without loading it."""

from __future__ import annotations

import mmap
import os
from types import TracebackType
from typing import Self

from guestmem import Bitmap
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES
from migration.wire import headers
from migration.wire.constants import RAM_SECTION_IDSTR, SectionType
from migration.wire.errors import RemoteStreamError, TruncatedStreamError

from ..file_channel import FileReader
from .mapped import CAPABILITY, MappedArea, file_ops, read_setup


class MappedSnapshot:
    """A mapped-ram file opened for looking at, page by page or as memory, without loading it.

    :ivar configuration: what its header says. :ivar areas: by block name.
    :raises RemoteStreamError: not such a file. :raises OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, offset: int = 0) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._bitmaps: dict[str, Bitmap] = {}
        try:
            self.configuration, self.areas = self._read(offset, str(path))
        except BaseException:
            os.close(self._fd)
            raise

    def _read(self, offset: int, name: str) -> tuple[headers.Configuration, dict[str, MappedArea]]:
        reader = FileReader(file_ops(self._fd, name=name), position=offset)
        headers.read_file_header(reader)
        headers.read_section_type(reader)
        configuration = headers.read_configuration(reader)
        if CAPABILITY not in (configuration.capabilities or ()):
            raise RemoteStreamError(
                "a plain stream, not a mapped-ram file", offset=offset, section="configuration"
            )
        kind = headers.read_section_type(reader)
        header = headers.read_section_header(reader, kind, {})
        if kind is not SectionType.START or header.idstr != RAM_SECTION_IDSTR:
            raise RemoteStreamError(f"section {header.idstr!r} before RAM", offset=reader.position)
        _, areas = read_setup(reader)
        return configuration, {area.idstr: area for area in areas}

    def bitmap(self, idstr: str) -> Bitmap:
        """A bit per target page of a block that is in the file; the others are zero."""
        if idstr not in self._bitmaps:
            self._bitmaps[idstr] = self.areas[idstr].read_bitmap(self._fd)
        return self._bitmaps[idstr]

    def read(self, idstr: str, offset: int, length: int) -> bytes:
        """Part of a block as the guest saw it: pages that are not there read as zero.

        :raises ValueError: outside the block. :raises TruncatedStreamError: the file is cut short.
        """
        area = self.areas[idstr]
        if offset < 0 or length < 0 or offset + length > area.used_length:
            raise ValueError(f"[{offset:#x}, {offset + length:#x}) is outside block {idstr!r}")
        present, parts = self.bitmap(idstr), []
        while length:
            step = min(length, TARGET_PAGE_BYTES - offset % TARGET_PAGE_BYTES)
            is_there = present.test(offset >> TARGET_PAGE_BITS)
            data = os.pread(self._fd, step, area.pages_at + offset) if is_there else bytes(step)
            if len(data) < step:
                raise TruncatedStreamError(
                    f"block {idstr!r} is cut short", offset=area.pages_at + offset
                )
            parts.append(data)
            offset, length = offset + step, length - step
        return b"".join(parts)

    def map(self, idstr: str) -> mmap.mmap:
        """A block as private memory, loaded page by page when touched; changes stay in memory.

        In a file this runtime wrote what is not there is a hole, and reads as zero. In one a QEMU
        wrote while its guest ran, a page that became zero may hold old bytes: ask :meth:`bitmap`.

        :raises ValueError: the block does not begin at a page of the file (the stream was moved).
        """
        area = self.areas[idstr]
        if area.pages_at % mmap.ALLOCATIONGRANULARITY:
            raise ValueError(f"block {idstr!r} begins at {area.pages_at:#x}: no page border")
        return mmap.mmap(
            self._fd,
            area.used_length,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=area.pages_at,
        )

    def close(self) -> None:
        """Close the file; mappings stay."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
