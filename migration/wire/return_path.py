"""The return path: what the destination tells the source.

Same channel, opposite direction: be16 type, be16 payload length, payload. The bitmap of a
RECV_BITMAP reply follows **outside** its message. Writers must hold one lock per channel: the fault
thread and others write to it.

In postcopy these messages are framed and parsed in C; this codec serves everything before LISTEN,
the recovery handshake, the analyser and the tests. Source: QEMU ``migration/migration.c``
(``source_return_path_thread``), ``migration/ram.c`` (``ram_dirty_bitmap_reload``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from .constants import (
    RECV_BITMAP_BYTES_MAX,
    RECV_BITMAP_END,
    RESUME_ACK_VALUE,
    RETURN_PATH_PAYLOAD_MAX,
    ReturnPathType,
)
from .errors import LocalStreamError, RemoteStreamError
from .fields import counted_name, read_be16, read_be32, read_be64, read_name, unsigned
from .io import BytesReader, Reader, Writer


@dataclass(frozen=True, slots=True)
class Shut:
    """Last message of a migration: 0 all is well, anything else the load failed."""

    value: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer to the PING of the same value. After LISTEN, pongs need not come in the order of the
    pings."""

    value: int


@dataclass(frozen=True, slots=True)
class RequestPages:
    """A vCPU waits for these bytes.

    :ivar offset: bytes from the start of the RAM block; multiple of its host page.
    :ivar length: bytes wanted, below 2**32; multiple of the host page.
    :ivar idstr: the block; None for the block of the previous request.
    """

    offset: int
    length: int
    idstr: str | None = None


@dataclass(frozen=True, slots=True)
class RecvBitmapReply:
    """The received bitmap of this block follows (:func:`write_received_bitmap`)."""

    idstr: str


@dataclass(frozen=True, slots=True)
class ResumeAck:
    """Recovery: the destination is ready to go on."""

    value: int = RESUME_ACK_VALUE


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """QEMU 8.1 and later: every device that asked to be waited for is ready."""


ReturnPathMessage: TypeAlias = (
    Shut | Pong | RequestPages | RecvBitmapReply | ResumeAck | SwitchoverAck
)


def rp_name(message: ReturnPathMessage) -> str:
    """The message's name as QEMU spells it, e.g. ``"REQ_PAGES_ID"``."""
    return _type_of(message).name


def write_rp(writer: Writer, message: ReturnPathMessage) -> None:
    """Write one message in a single call to ``writer``.

    :raises LocalStreamError: a value does not fit its field. Nothing is written then.
    """
    payload = _payload(message)
    kind = _type_of(message).to_bytes(2, "big")
    writer.write(kind + len(payload).to_bytes(2, "big") + payload)


def read_rp(reader: Reader) -> ReturnPathMessage:
    """Read one message; for a :class:`RecvBitmapReply` the caller goes on with
    :func:`read_received_bitmap`.

    :raises RemoteStreamError: unknown type, or a payload that does not have the type's shape.
    """
    at = reader.position
    number = read_be16(reader)
    length = read_be16(reader)
    try:
        kind = ReturnPathType(number)
    except ValueError:
        raise RemoteStreamError(f"unknown return-path message {number}", offset=at) from None
    section = f"return path {kind.name}"
    if length > RETURN_PATH_PAYLOAD_MAX:
        raise RemoteStreamError(f"payload of {length} bytes", offset=at + 2, section=section)
    base = reader.position
    body = BytesReader(reader.read(length), base=base, section=section)
    message = _PARSERS[kind](body, section)
    if body.remaining:
        raise RemoteStreamError(
            f"{length} bytes of payload, {body.remaining} too many", offset=base, section=section
        )
    return message


def received_bitmap_bytes(page_count: int) -> int:
    """Bytes of a bitmap on the wire: one bit per target page, rounded up to a multiple of 8
    bytes."""
    return (page_count + 63) // 64 * 8


def write_received_bitmap(writer: Writer, bitmap: bytes, page_count: int) -> None:
    """Write the body that follows a :class:`RecvBitmapReply`.

    :param bitmap: little-endian bits, 1 = received; bit i is target page i. At least
        ``ceil(page_count / 8)`` bytes; padded with zeros to a multiple of 8.
    :raises LocalStreamError: the bitmap is too short or too long for ``page_count``.
    """
    size = received_bitmap_bytes(page_count)
    if not (page_count + 7) // 8 <= len(bitmap) <= size:
        raise LocalStreamError(f"{len(bitmap)} bytes of bitmap for {page_count} pages")
    writer.write(
        size.to_bytes(8, "big") + bitmap.ljust(size, b"\0") + RECV_BITMAP_END.to_bytes(8, "big")
    )


def read_received_bitmap(
    reader: Reader, page_count: int | None = None, *, section: str = "received bitmap"
) -> bytes:
    """Read the body that follows a :class:`RecvBitmapReply`.

    :param page_count: target pages of the block; None takes any size up to the bound (an observer
        that does not know the block).
    :returns: little-endian bits, a multiple of 8 bytes; bits past ``page_count`` mean nothing.
    :raises RemoteStreamError: size or end mark are wrong.
    """
    at = reader.position
    size = read_be64(reader)
    if page_count is not None and size != received_bitmap_bytes(page_count):
        raise RemoteStreamError(
            f"bitmap of {size} bytes for {page_count} pages", offset=at, section=section
        )
    if size > RECV_BITMAP_BYTES_MAX or size % 8:
        raise RemoteStreamError(f"bitmap of {size} bytes", offset=at, section=section)
    bitmap = reader.read(size)
    at = reader.position
    end = read_be64(reader)
    if end != RECV_BITMAP_END:
        raise RemoteStreamError(f"end mark {end:#018x}", offset=at, section=section)
    return bitmap


def _type_of(message: ReturnPathMessage) -> ReturnPathType:
    match message:
        case Shut():
            return ReturnPathType.SHUT
        case Pong():
            return ReturnPathType.PONG
        case RequestPages(idstr=None):
            return ReturnPathType.REQ_PAGES
        case RequestPages():
            return ReturnPathType.REQ_PAGES_ID
        case RecvBitmapReply():
            return ReturnPathType.RECV_BITMAP
        case ResumeAck():
            return ReturnPathType.RESUME_ACK
        case SwitchoverAck():
            return ReturnPathType.SWITCHOVER_ACK


def _payload(message: ReturnPathMessage) -> bytes:
    match message:
        case Shut(value) | Pong(value) | ResumeAck(value):
            return unsigned(value, 4, "value")
        case RequestPages(offset, length, idstr):
            if length == 0:
                raise LocalStreamError(f"request of no bytes at {offset:#x}")
            where = unsigned(offset, 8, "request offset") + unsigned(length, 4, "request length")
            return where if idstr is None else where + counted_name(idstr, "block name")
        case RecvBitmapReply(idstr):
            return counted_name(idstr, "block name")
        case SwitchoverAck():
            return b""


_Parser: TypeAlias = Callable[[BytesReader, str], ReturnPathMessage]


def _parse_request(body: BytesReader, section: str) -> RequestPages:
    at = body.position
    offset = read_be64(body)
    length = read_be32(body)
    if length == 0 or offset + length > 1 << 64:
        raise RemoteStreamError(f"request {offset:#x}+{length:#x}", offset=at, section=section)
    return RequestPages(offset, length)


def _parse_request_id(body: BytesReader, section: str) -> RequestPages:
    where = _parse_request(body, section)
    return RequestPages(where.offset, where.length, read_name(body, "block name", section=section))


def _parse_resume_ack(body: BytesReader, section: str) -> ResumeAck:
    at = body.position
    value = read_be32(body)
    if value != RESUME_ACK_VALUE:
        raise RemoteStreamError(f"resume not acknowledged ({value})", offset=at, section=section)
    return ResumeAck(value)


_PARSERS: dict[ReturnPathType, _Parser] = {
    ReturnPathType.SHUT: lambda body, section: Shut(read_be32(body)),
    ReturnPathType.PONG: lambda body, section: Pong(read_be32(body)),
    ReturnPathType.REQ_PAGES_ID: _parse_request_id,
    ReturnPathType.REQ_PAGES: _parse_request,
    ReturnPathType.RECV_BITMAP: lambda body, section: RecvBitmapReply(
        read_name(body, "block name", section=section)
    ),
    ReturnPathType.RESUME_ACK: _parse_resume_ack,
    ReturnPathType.SWITCHOVER_ACK: lambda body, section: SwitchoverAck(),
}
