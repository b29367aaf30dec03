"""The few shapes all headers and messages are made of: big-endian integers and counted names.

Names are UTF-8 on both ends of this project; QEMU only ever sends ASCII. A name of another encoding
is refused rather than guessed at, because it has to compare equal to a name of our own.
"""

from __future__ import annotations

from .constants import IDSTR_BYTES_MAX
from .errors import LocalStreamError, RemoteStreamError
from .io import Reader


def read_u8(reader: Reader) -> int:
    """One unsigned byte."""
    return reader.read(1)[0]


def read_be16(reader: Reader) -> int:
    """Two bytes, big-endian, unsigned."""
    return int.from_bytes(reader.read(2), "big")


def read_be32(reader: Reader) -> int:
    """Four bytes, big-endian, unsigned."""
    return int.from_bytes(reader.read(4), "big")


def read_be64(reader: Reader) -> int:
    """Eight bytes, big-endian, unsigned."""
    return int.from_bytes(reader.read(8), "big")


def unsigned(value: int, length: int, what: str) -> bytes:
    """``value`` as ``length`` big-endian bytes.

    :raises LocalStreamError: it does not fit; the message names ``what``.
    """
    if not 0 <= value < 1 << (8 * length):
        raise LocalStreamError(f"{what} {value:#x} does not fit {length} bytes")
    return value.to_bytes(length, "big")


def read_name(reader: Reader, what: str, *, section: str | None = None) -> str:
    """A byte count (1..255) and that many bytes of UTF-8.

    :raises RemoteStreamError: the name is empty or not UTF-8; the message names ``what``.
    """
    at = reader.position
    length = read_u8(reader)
    if length == 0:
        raise RemoteStreamError(f"empty {what}", offset=at, section=section)
    return decode_name(reader.read(length), what, offset=at, section=section)


def decode_name(data: bytes, what: str, *, offset: int, section: str | None = None) -> str:
    """``data`` as text; a typed error that shows the bytes when it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise RemoteStreamError(
            f"{what} {data[:32]!r} is not UTF-8", offset=offset, section=section
        ) from None


def counted_name(name: str, what: str) -> bytes:
    """A byte count and the name, the inverse of :func:`read_name`.

    :raises LocalStreamError: the name is empty or longer than 255 bytes of UTF-8.
    """
    data = name.encode("utf-8")
    if not 1 <= len(data) <= IDSTR_BYTES_MAX:
        raise LocalStreamError(f"{what} {name!r} must have 1 to {IDSTR_BYTES_MAX} bytes")
    return bytes([len(data)]) + data
