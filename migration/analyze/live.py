"""Live sections other than RAM whose records can be told apart: ``dirty-bitmap`` and ``block``.

Each function reads the payload of one START, PART or END section up to its own end mark and returns
what a person wants to know of it. Sources: QEMU ``migration/block-dirty-bitmap.c``,
``migration/block.c`` (up to 9.0).
"""

from __future__ import annotations

from collections.abc import Callable

from migration.wire.errors import RemoteStreamError
from migration.wire.fields import read_be32, read_be64, read_name, read_u8

from .source import Source

_SECTOR_BYTES = 512
_BITMAP_BUFFER_BYTES_MAX = 1 << 20
_BITMAP_CHUNKS_KEPT = 256
_DISK_CHUNK_BYTES = 1 << 20


def read_dirty_bitmap(source: Source) -> dict[str, object]:
    """Chunks of the ``dirty-bitmap`` section, up to the one that carries EOS."""
    chunks: list[dict[str, object]] = []
    count = 0
    while True:
        chunk = _read_bitmap_chunk(source)
        count += 1
        if len(chunk) > 1 and len(chunks) < _BITMAP_CHUNKS_KEPT:
            chunks.append({key: value for key, value in chunk.items() if key != "last"})
        if chunk["last"]:
            return {"chunk_count": count, "chunks": chunks}


def _read_bitmap_chunk(source: Source) -> dict[str, object]:
    start = source.position
    flags = _read_bitmap_flags(source)
    chunk: dict[str, object] = {"last": bool(flags & 0x01)}
    if flags & ~0x7F:
        raise _bad(f"dirty-bitmap chunk flags {flags:#x}", source, start)
    if flags & 0x08:
        chunk["node"] = read_name(source, "node name", section=source.section)
    if flags & 0x04:
        chunk["bitmap"] = read_name(source, "bitmap name", section=source.section)
    if flags & 0x10:
        chunk["granularity"] = read_be32(source)
        bits = read_u8(source)
        if bits & ~0x07:
            raise _bad(f"bitmap flags {bits:#x}", source, start)
        chunk["enabled"] = bool(bits & 1)
        chunk["persistent"] = bool(bits & 2)
    if flags & 0x20:
        chunk["complete"] = True
    if flags & 0x40:
        chunk["first_sector"] = read_be64(source)
        chunk["sectors"] = read_be32(source)
        if flags & 0x02:
            chunk["zeroes"] = True
        else:
            chunk["bytes"] = _skip_bitmap(source)
    return chunk


def _read_bitmap_flags(source: Source) -> int:
    """One byte; two if its top bit is set; four if the second's is too. QEMU sends one."""
    flags = read_u8(source)
    if not flags & 0x80:
        return flags
    flags = flags << 8 | read_u8(source)
    if not flags & 0x80:
        return flags
    return flags << 16 | read_u8(source) << 8 | read_u8(source)


def _skip_bitmap(source: Source) -> int:
    start = source.position
    size = read_be64(source)
    if size > _BITMAP_BUFFER_BYTES_MAX:
        raise _bad(f"bitmap data of {size} bytes", source, start)
    source.skip(size)
    return size


def read_block_migration(source: Source) -> dict[str, object]:
    """Records of the ``block`` section of QEMU up to 9.0, up to EOS."""
    chunks: dict[str, int] = {}
    progress: int | None = None
    while True:
        start = source.position
        word = read_be64(source)
        flags = word & (_SECTOR_BYTES - 1)
        if flags & ~0x0F or not flags:
            raise _bad(f"block record {word:#x}", source, start)
        if flags & 0x01:
            device = read_name(source, "device name", section=source.section)
            if device not in chunks and len(chunks) >= _BITMAP_CHUNKS_KEPT:
                raise _bad("too many devices", source, start)
            chunks[device] = chunks.get(device, 0) + 1
            if not flags & 0x08:
                source.skip(_DISK_CHUNK_BYTES)
        if flags & 0x04:
            progress = word >> 9
        if flags & 0x02:
            result: dict[str, object] = {"chunks": chunks}
            if progress is not None:
                result["progress_percent"] = progress
            return result


LIVE_READERS: dict[str, Callable[[Source], dict[str, object]]] = {
    "dirty-bitmap": read_dirty_bitmap,
    "block": read_block_migration,
}


def _bad(reason: str, source: Source, offset: int) -> RemoteStreamError:
    return RemoteStreamError(reason, offset=offset, section=source.section)
