"""The data plane in C: page loops, record and control framing, the return path.

Owns everything that happens once per page and everything a thread asleep on a missing page waits
for. Knows nothing of Python objects: a call releases the GIL for its whole duration and returns
only with a result, an error or a reason to ask Python. :mod:`migration.runtime` is its only user
besides the codecs below.
"""

from __future__ import annotations

from ._native import ffi, lib

__all__ = ["crc32c", "ffi", "lib"]


def crc32c(data: bytes | memoryview, crc: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of ``data``, going on from ``crc``. Uses SSE4.2 where present."""
    return int(lib.crc32c(crc, ffi.from_buffer(data), len(data)))
