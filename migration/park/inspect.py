"""Looking at a parked VM without touching it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .manifest import Manifest, ParkedBlock
from .store import checksum, data_extents

MAP_CELLS = 48
_SHADES = ".░▒▓█"


@dataclass(frozen=True, slots=True)
class Figures:
    """What the files say.

    :ivar disk_bytes: allocated on disk. :ivar maps: per block a line of cells, darker = more data.
    :ivar damaged: names of blocks whose checksum is wrong (only looked at when asked to).
    """

    disk_bytes: int
    maps: dict[str, str]
    damaged: tuple[str, ...]


def look(directory: Path, manifest: Manifest, *, verify: bool) -> Figures:
    """:raises OSError: a file cannot be read."""
    disk_bytes, maps, damaged = 0, {}, []
    for block in manifest.blocks:
        fd = os.open(directory / block.file, os.O_RDWR | os.O_CLOEXEC)
        try:
            disk_bytes += os.fstat(fd).st_blocks * 512
            maps[block.idstr] = _map(fd, block)
            if verify and checksum(fd, block.used_length) != block.crc32c:
                damaged.append(block.idstr)
        finally:
            os.close(fd)
    return Figures(disk_bytes, maps, tuple(damaged))


def _map(fd: int, block: ParkedBlock) -> str:
    cells = [0] * MAP_CELLS
    width = block.used_length / MAP_CELLS
    for start, end in data_extents(fd, block.used_length):
        for cell in range(int(start / width), min(MAP_CELLS - 1, int((end - 1) / width)) + 1):
            cells[cell] += int(min(end, (cell + 1) * width) - max(start, cell * width))
    return "".join(_shade(count / width) for count in cells)


def _shade(share: float) -> str:
    return _SHADES[0] if share <= 0 else _SHADES[min(4, 1 + int(share * 3.999))]
