"""Commands: what the source tells the destination between sections.

On the wire: ``08``, be16 number, be16 payload length, payload; no footer. :func:`read_command`
starts after the ``08``, :func:`write_command` writes it. A PACKAGED command is followed by
``length`` more bytes, which are not part of it: the receiver must have them all before it acts on
the first.

Source: QEMU ``migration/savevm.c`` (``mig_cmd_args``, ``loadvm_process_command``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .constants import (
    DISCARD_RANGES_MAX,
    DISCARD_VERSION,
    ZERO_RANGES_MAX,
    CommandNumber,
    SectionType,
)
from .errors import LocalStreamError, RemoteStreamError
from .fields import counted_name, read_be16, read_be64, read_name, unsigned
from .io import BytesReader, Reader, Writer

_RANGE_BYTES = 16


@dataclass(frozen=True, slots=True)
class OpenReturnPath:
    """The destination may use its write side of the same channel. A second one is harmless."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered by a PONG of the same value. Fatal for a QEMU before OPEN_RETURN_PATH."""

    value: int


@dataclass(frozen=True, slots=True)
class PostcopyAdvise:
    """Postcopy may come. Both numbers must equal the destination's own.

    :ivar page_sizes_summary: or of the host page sizes of all migrated RAM blocks, bytes.
    :ivar target_page_bytes: target page size, bytes.
    """

    page_sizes_summary: int
    target_page_bytes: int


@dataclass(frozen=True, slots=True)
class PostcopyAdviseEmpty:
    """ADVISE without payload: only dirty-bitmap postcopy is on."""


@dataclass(frozen=True, slots=True)
class PostcopyListen:
    """Only inside a package: from here on missing pages are asked for."""


@dataclass(frozen=True, slots=True)
class PostcopyRun:
    """Start the guest. Against a stock QEMU the last thing in the package."""


@dataclass(frozen=True, slots=True)
class DiscardRange:
    """``length`` bytes of a RAM block from ``start``; multiples of the block's host page."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class RamDiscard:
    """Pages of one block that turned stale: drop them so that they fault again. At least one
    range."""

    idstr: str
    ranges: tuple[DiscardRange, ...]


@dataclass(frozen=True, slots=True)
class Packaged:
    """``length`` bytes of sections and commands follow as one blob (up to 4 GiB - 1)."""

    length: int


@dataclass(frozen=True, slots=True)
class EnableColo:
    """COLO replication follows the migration."""


@dataclass(frozen=True, slots=True)
class PostcopyResume:
    """Recovery: the source is ready to go on."""


@dataclass(frozen=True, slots=True)
class RecvBitmap:
    """Recovery: send the received bitmap of this block."""

    idstr: str


@dataclass(frozen=True, slots=True)
class SwitchoverStart:
    """QEMU 10.0 and later: the source is about to stop its guest. Fatal for 7.2, so never sent to
    an unknown peer."""


@dataclass(frozen=True, slots=True)
class RamNeeded:
    """Ours (feature SPARSE), before ADVISE: ``length`` bytes of RAM hold something, so the
    destination can see whether it has the room."""

    length: int


@dataclass(frozen=True, slots=True)
class RamZero:
    """Ours (feature SPARSE), before LISTEN: these pages of one block were never written. They are
    zero at the destination too and will not be sent. Shape and rules of a :class:`RamDiscard`."""

    idstr: str
    ranges: tuple[DiscardRange, ...]


Command: TypeAlias = (
    OpenReturnPath
    | Ping
    | PostcopyAdvise
    | PostcopyAdviseEmpty
    | PostcopyListen
    | PostcopyRun
    | RamDiscard
    | Packaged
    | EnableColo
    | PostcopyResume
    | RecvBitmap
    | SwitchoverStart
    | RamNeeded
    | RamZero
)

COMMAND_NUMBERS: dict[type[Command], CommandNumber] = {
    OpenReturnPath: CommandNumber.OPEN_RETURN_PATH,
    Ping: CommandNumber.PING,
    PostcopyAdvise: CommandNumber.POSTCOPY_ADVISE,
    PostcopyAdviseEmpty: CommandNumber.POSTCOPY_ADVISE,
    PostcopyListen: CommandNumber.POSTCOPY_LISTEN,
    PostcopyRun: CommandNumber.POSTCOPY_RUN,
    RamDiscard: CommandNumber.POSTCOPY_RAM_DISCARD,
    Packaged: CommandNumber.PACKAGED,
    EnableColo: CommandNumber.ENABLE_COLO,
    PostcopyResume: CommandNumber.POSTCOPY_RESUME,
    RecvBitmap: CommandNumber.RECV_BITMAP,
    SwitchoverStart: CommandNumber.SWITCHOVER_START,
    RamNeeded: CommandNumber.X_RAM_NEEDED,
    RamZero: CommandNumber.X_RAM_ZERO,
}


def command_name(command: Command) -> str:
    """The command's name as QEMU spells it, e.g. ``"POSTCOPY_ADVISE"``."""
    return COMMAND_NUMBERS[type(command)].name


def write_command(writer: Writer, command: Command) -> None:
    """Write one command in a single call to ``writer``.

    :raises LocalStreamError: a value does not fit its field, or a RamDiscard without ranges or with
        more than fit a be16 length (see :func:`split_discards`). Nothing is written then.
    """
    payload = _payload(command)
    length = unsigned(len(payload), 2, f"length of command {command_name(command)}")
    number = COMMAND_NUMBERS[type(command)].to_bytes(2, "big")
    writer.write(bytes([SectionType.COMMAND]) + number + length + payload)


def read_command(reader: Reader) -> Command:
    """Read one command after its ``08`` byte.

    :raises RemoteStreamError: unknown number, or a payload that does not have the command's shape;
        the offset is that of the number or of the field.
    """
    at = reader.position
    number = read_be16(reader)
    length = read_be16(reader)
    try:
        name = CommandNumber(number).name
    except ValueError:
        raise RemoteStreamError(f"unknown command {number}", offset=at) from None
    section = f"command {name}"
    parse = _PARSERS[CommandNumber(number)]
    base = reader.position
    body = BytesReader(reader.read(length), base=base, section=section)
    command = parse(body, section)
    if body.remaining:
        raise RemoteStreamError(
            f"{length} bytes of payload, {body.remaining} too many", offset=base, section=section
        )
    return command


def split_discards(idstr: str, ranges: Iterable[DiscardRange]) -> Iterator[RamDiscard]:
    """Commands that discard ``ranges`` of one block, at most 12 ranges each, in the given order.

    No range, no command: a RAM_DISCARD without ranges is refused by QEMU.
    """
    for batch in _batches(ranges, DISCARD_RANGES_MAX):
        yield RamDiscard(idstr, batch)


def split_zeros(idstr: str, ranges: Iterable[DiscardRange]) -> Iterator[RamZero]:
    """Commands that tell of ``ranges`` of one block, in the given order."""
    for batch in _batches(ranges, ZERO_RANGES_MAX):
        yield RamZero(idstr, batch)


def _batches(ranges: Iterable[DiscardRange], limit: int) -> Iterator[tuple[DiscardRange, ...]]:
    rest = iter(ranges)
    while batch := tuple(itertools.islice(rest, limit)):
        yield batch


def _payload(command: Command) -> bytes:
    match command:
        case Ping(value):
            return unsigned(value, 4, "ping value")
        case PostcopyAdvise(summary, target_page_bytes):
            return unsigned(summary, 8, "page sizes summary") + unsigned(
                target_page_bytes, 8, "target page size"
            )
        case RamNeeded(length):
            return unsigned(length, 8, "RAM needed")
        case RamDiscard(idstr, ranges) | RamZero(idstr, ranges):
            return _discard_payload(idstr, ranges)
        case Packaged(length):
            return unsigned(length, 4, "package length")
        case RecvBitmap(idstr):
            return counted_name(idstr, "block name")
        case _:
            return b""


def _discard_payload(idstr: str, ranges: tuple[DiscardRange, ...]) -> bytes:
    if not ranges:
        raise LocalStreamError("RAM_DISCARD without a range is refused by QEMU")
    out = bytearray([DISCARD_VERSION]) + counted_name(idstr, "block name") + b"\0"
    for each in ranges:
        if each.length == 0:
            # A QEMU destination with shared memory passes this to fallocate(2), which refuses it.
            raise LocalStreamError(f"empty discard range at {each.start:#x} of {idstr!r}")
        out += unsigned(each.start, 8, "discard start") + unsigned(each.length, 8, "discard length")
    return bytes(out)


_Parser: TypeAlias = Callable[[BytesReader, str], Command]


def _bare(kind: Callable[[], Command]) -> _Parser:
    """A parser for a command without payload (what is left over is reported by the caller)."""
    return lambda body, section: kind()


def _parse_ping(body: BytesReader, section: str) -> Command:
    return Ping(int.from_bytes(body.read(4), "big"))


def _parse_advise(body: BytesReader, section: str) -> Command:
    if body.remaining == 0:
        return PostcopyAdviseEmpty()
    return PostcopyAdvise(read_be64(body), read_be64(body))


def _parse_packaged(body: BytesReader, section: str) -> Command:
    return Packaged(int.from_bytes(body.read(4), "big"))


def _parse_recv_bitmap(body: BytesReader, section: str) -> Command:
    return RecvBitmap(read_name(body, "block name", section=section))


def _parse_needed(body: BytesReader, section: str) -> Command:
    return RamNeeded(read_be64(body))


def _parse_discard(body: BytesReader, section: str) -> Command:
    return RamDiscard(*_parse_ranges(body, section))


def _parse_zero(body: BytesReader, section: str) -> Command:
    return RamZero(*_parse_ranges(body, section))


def _parse_ranges(body: BytesReader, section: str) -> tuple[str, tuple[DiscardRange, ...]]:
    at = body.position
    version = body.read(1)[0]
    if version != DISCARD_VERSION:
        raise RemoteStreamError(f"discard version {version}", offset=at, section=section)
    idstr = read_name(body, "block name", section=section)
    if body.read(1) != b"\0":
        raise RemoteStreamError(
            "no NUL after the block name", offset=body.position - 1, section=section
        )
    if body.remaining == 0 or body.remaining % _RANGE_BYTES:
        raise RemoteStreamError(
            f"{body.remaining} bytes are no list of ranges", offset=body.position, section=section
        )
    ranges: list[DiscardRange] = []
    while body.remaining:
        at = body.position
        each = DiscardRange(read_be64(body), read_be64(body))
        if each.start + each.length > 1 << 64:
            raise RemoteStreamError(
                f"range {each.start:#x}+{each.length:#x} wraps", offset=at, section=section
            )
        ranges.append(each)
    return idstr, tuple(ranges)


_PARSERS: dict[CommandNumber, _Parser] = {
    CommandNumber.OPEN_RETURN_PATH: _bare(OpenReturnPath),
    CommandNumber.PING: _parse_ping,
    CommandNumber.POSTCOPY_ADVISE: _parse_advise,
    CommandNumber.POSTCOPY_LISTEN: _bare(PostcopyListen),
    CommandNumber.POSTCOPY_RUN: _bare(PostcopyRun),
    CommandNumber.POSTCOPY_RAM_DISCARD: _parse_discard,
    CommandNumber.PACKAGED: _parse_packaged,
    CommandNumber.ENABLE_COLO: _bare(EnableColo),
    CommandNumber.POSTCOPY_RESUME: _bare(PostcopyResume),
    CommandNumber.RECV_BITMAP: _parse_recv_bitmap,
    CommandNumber.SWITCHOVER_START: _bare(SwitchoverStart),
    CommandNumber.X_RAM_NEEDED: _parse_needed,
    CommandNumber.X_RAM_ZERO: _parse_zero,
}
