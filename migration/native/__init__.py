"""The data plane in C: page loops, record and control framing, the return path.

Owns everything that happens once per page and everything a thread asleep on a missing page waits
for. Knows nothing of Python objects: a call releases the GIL for its whole duration and returns
only with a result, an error or a reason to ask Python. :mod:`migration.runtime` is its only user
besides the codecs below.
"""

from __future__ import annotations

from ._native import ffi, lib

__all__ = ["crc32c", "crc32c_pages", "ffi", "lib"]


def crc32c(data: bytes | memoryview, crc: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of ``data``, going on from ``crc``. Uses SSE4.2 where
    present."""
    return int(lib.crc32c(crc, ffi.from_buffer(data), len(data)))


def crc32c_pages(memory: object, start: int, end: int, crc: int = 0) -> int:
    """CRC-32C over (big-endian offset, bytes) of every target page in ``[start, end)`` that is not
    all zero: the same for a hole as for written zeros.

    :param memory: a buffer; both ends are multiples of the target page inside it.
    """
    return int(lib.crc32c_pages(ffi.from_buffer(memory), start, end, crc))
