"""Where a section ends whose layout is not known: by its footer, and by the description's lengths.

A device section carries no length. Two things tell it afterwards: the footer that ends it (``7e``
and the section id), followed by something that may legally follow; and the description trailer,
which comes only after the end of the stream, and never inside a postcopy package. The search
works while reading; the description has the last word where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from migration.wire.constants import SECTION_FOOTER, CommandNumber, SectionType
from migration.wire.errors import RemoteStreamError
from migration.wire.headers import (
    SectionHeader,
    check_footer,
    read_section_header,
    read_section_type,
)
from migration.wire.io import BytesReader

from .description import Described, Description, parse_description
from .source import Source

_FOOTER_BYTES = 5
_FIRST_LOOK_BYTES = 4 << 10
_FOLLOWING_BYTES = 1 + 4 + 1 + 255 + 8
"""The longest thing a verdict on what follows needs: a whole START or FULL header."""
_VERSION_PLAUSIBLE_MAX = 1 << 16
_DESCRIPTION_TRIES_MAX = 16
_COMMAND_LENGTHS = {
    CommandNumber.OPEN_RETURN_PATH: (0,),
    CommandNumber.PING: (4,),
    CommandNumber.POSTCOPY_ADVISE: (0, 16),
    CommandNumber.POSTCOPY_LISTEN: (0,),
    CommandNumber.POSTCOPY_RUN: (0,),
    CommandNumber.PACKAGED: (4,),
    CommandNumber.ENABLE_COLO: (0,),
    CommandNumber.POSTCOPY_RESUME: (0,),
    CommandNumber.SWITCHOVER_START: (0,),
}


def read_to_footer(
    source: Source,
    header: SectionHeader,
    started: Mapping[int, SectionHeader],
    length_max: int,
) -> bytes:
    """The payload up to the footer; the footer itself is left to be read.

    :param length_max: bytes that may be held while searching.
    :raises RemoteStreamError: no footer within the bound, or none before the end of the file or
        package; the offset is that of the payload.
    """
    mark = bytes([SECTION_FOOTER]) + header.section_id.to_bytes(4, "big")
    start = source.position
    look = _FIRST_LOOK_BYTES
    searched = 0
    while True:
        window = source.peek(look)
        at = window.find(mark, searched)
        while at >= 0:
            end = at + _FOOTER_BYTES
            if end + _FOLLOWING_BYTES > len(window) == look:
                break  # look further before judging what follows
            if _may_follow(window[end : end + _FOLLOWING_BYTES], source, header, started):
                return source.read(at)
            at = window.find(mark, at + 1)
        if len(window) < look:
            raise RemoteStreamError(
                f"no footer of section id {header.section_id} before the end",
                offset=start,
                section=source.section,
            )
        if look >= length_max:
            raise RemoteStreamError(
                f"more than {length_max} bytes of device data to hold (see --hold)",
                offset=start,
                section=source.section,
            )
        searched = at if at >= 0 else max(0, len(window) - _FOOTER_BYTES + 1)
        look = min(2 * look, length_max + _FOOTER_BYTES + _FOLLOWING_BYTES)


def _may_follow(
    tail: bytes, source: Source, header: SectionHeader, started: Mapping[int, SectionHeader]
) -> bool:
    """True when ``tail``, the bytes after a possible footer, is a legal continuation."""
    in_package = source.remaining_in_package is not None
    if not tail:
        return True  # the end of the package, or a stream cut right here
    kind, rest = tail[0], tail[1:]
    if kind in (SectionType.START, SectionType.FULL):
        return _is_header(rest, header, started)
    if kind in (SectionType.PART, SectionType.END):
        return len(rest) < 4 or int.from_bytes(rest[:4], "big") in started
    if kind == SectionType.COMMAND:
        return _is_command(rest)
    if kind == SectionType.EOF and not in_package:
        return not rest or _is_description(rest)
    return False


def _is_header(rest: bytes, header: SectionHeader, started: Mapping[int, SectionHeader]) -> bool:
    section_id = int.from_bytes(rest[:4], "big")
    if len(rest) < 5:
        return True
    if section_id == header.section_id or section_id in started or not rest[4]:
        return False
    name = rest[5 : 5 + rest[4]]
    if not all(0x20 <= byte < 0x7F for byte in name):
        return False
    numbers = rest[5 + rest[4] : 13 + rest[4]]
    return len(numbers) < 8 or int.from_bytes(numbers[4:], "big") < _VERSION_PLAUSIBLE_MAX


def _is_command(rest: bytes) -> bool:
    if len(rest) < 4:
        return True
    try:
        number = CommandNumber(int.from_bytes(rest[:2], "big"))
    except ValueError:
        return False
    length = int.from_bytes(rest[2:4], "big")
    return length in _COMMAND_LENGTHS.get(number, (length,))


def _is_description(rest: bytes) -> bool:
    if rest[0] != SectionType.VMDESCRIPTION:
        return False
    return len(rest) < 6 or rest[5:6] == b"{"


@dataclass(frozen=True, slots=True)
class CutSection:
    """One FULL section found in held bytes. Offsets count from the start of those bytes."""

    header: SectionHeader
    start: int
    payload_start: int
    payload: bytes
    end: int


def cut_by_description(
    data: bytes, devices: Sequence[Described], *, has_footers: bool
) -> list[CutSection]:
    """Cut back-to-back FULL sections with the lengths the description gives them.

    :param data: exactly the sections, from the first type byte to the end of the last.
    :raises RemoteStreamError: they do not fit; the offset counts from the start of ``data``.
    """
    reader = BytesReader(data)
    cuts: list[CutSection] = []
    for device in devices:
        start = reader.position
        kind = read_section_type(reader)
        if kind is not SectionType.FULL:
            raise RemoteStreamError(f"{kind.name} among device sections", offset=start)
        header = read_section_header(reader, kind, {})
        if (header.idstr, header.instance_id) != (device.name, device.instance_id):
            raise RemoteStreamError(
                f"the description has {device.name!r} here", offset=start, section=header.idstr
            )
        payload_start = reader.position
        payload = reader.read(device.length)
        if has_footers:
            check_footer(reader, header)
        cuts.append(CutSection(header, start, payload_start, payload, reader.position))
    if reader.remaining:
        raise RemoteStreamError("more sections than described", offset=reader.position)
    return cuts


def find_description(data: bytes, offset: int) -> tuple[int, Description] | None:
    """Find the EOF byte and description behind device sections that have no footers.

    The proof of a candidate is that its lengths cut what is in front of it without a rest.

    :param data: from the first type byte of the device sections to the end of the stream.
    :param offset: file offset of ``data``.
    :returns: index of the EOF byte, and the description; None when there is none.
    """
    mark = bytes([SectionType.EOF, SectionType.VMDESCRIPTION])
    tries = 0
    at = data.rfind(mark)
    while at >= 0 and tries < _DESCRIPTION_TRIES_MAX:
        length = int.from_bytes(data[at + 2 : at + 6], "big")
        text = data[at + 6 : at + 6 + length]
        if len(text) == length and text.startswith(b"{"):
            tries += 1
            try:
                description = parse_description(text, offset + at + 6)
                cut_by_description(data[:at], description.devices, has_footers=False)
                return at, description
            except RemoteStreamError:
                pass  # no description, or that of something else: look further
        at = data.rfind(mark, 0, at + 1)
    return None
