"""A main channel taken apart and put together again, with other values in its devices if wanted.

Nothing is copied that is understood: header, configuration, commands, RAM records and described
devices are decoded to values and encoded from them. A stream that comes out as it went in was
understood, and one in which a value was changed is a stream a QEMU loads:

    def edit(device: DecodedDevice) -> None:
        if device.name == "globalstate":
            device.state["runstate"] = b"running".ljust(100, b"\\0")

    with open("new.bin", "wb") as out:
        rewrite_stream("old.bin", out, edit)

Two passes: the first finds where sections end and what the description at the end says of them.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from typing import BinaryIO

from migration.native import ffi, lib
from migration.wire.commands import Packaged, PostcopyAdvise, read_command, write_command
from migration.wire.constants import RAM_SECTION_IDSTR, XBZRLE_ENCODING, RamFlag, SectionType
from migration.wire.errors import LocalStreamError, RemoteStreamError
from migration.wire.headers import (
    SectionHeader,
    check_footer,
    read_configuration,
    read_file_header,
    read_section_header,
    read_section_type,
    read_vmdescription,
    write_configuration,
    write_end_of_stream,
    write_file_header,
    write_footer,
    write_section_header,
    write_vmdescription,
)
from migration.wire.io import BytesWriter, Writer
from migration.wire.ram_setup import read_ram_setup, write_ram_setup
from migration.wire.vmdesc import (
    DecodedDevice,
    decode_device,
    describe_device,
    describe_stream,
    encode_device,
    parse_vmdesc,
)

from .description import Description, parse_description
from .events import DescriptionEvent, ErrorEvent, HeaderEvent, SectionEvent
from .ram import RamChannel, RamRecord, iter_ram_records
from .session import Session
from .source import Source, open_source
from .state import MigrationState

Edit = Callable[[DecodedDevice], None]
"""Changes values, or the name, of a device in place. Not called for sections without description.
"""

_WORD_AND_NAME_MAX = 8 + 256
_ZLIB_LEVEL = 1  # QEMU's default


def rewrite_stream(path: str | PathLike[str], out: BinaryIO, edit: Edit | None = None) -> None:
    """Write the stream in ``path`` again.

    Without ``edit`` the bytes are the same, but for pages compressed with zlib, which only are the
    same once unpacked. Sections without a description (all devices in a postcopy package, live
    sections other than RAM) are passed on as they are. With ``edit`` the description is written
    anew from what the devices are then. What lies in the file before the stream is left out.

    :param path: a main channel: a file, or anything :func:`~migration.analyze.source.open_source`
        opens twice.
    :raises RemoteStreamError: the stream breaks, or is one with fixed places for its pages
        (mapped-ram) or in our checksum frames, which this does not write.
    :raises LocalStreamError: a changed value does not fit; device and field are named.
    :raises OSError: a file cannot be read or written.
    """
    survey = _survey(fspath(path))
    with open_source(fspath(path)) as source:
        source.skip(survey.start)
        _Rewriter(source, _Out(out), survey, edit).run()


@dataclass
class _Survey:
    """What the first pass found.

    :ivar start: file offset of the stream.
    :ivar lengths: of each section but RAM's, from its type byte to behind its footer.
    :ivar text: the description.
    """

    start: int = 0
    lengths: deque[int] = field(default_factory=deque)
    has_footers: bool = True
    text: bytes | None = None


def _survey(path: str) -> _Survey:
    found = _Survey()
    with ExitStack() as stack:
        session = Session([stack.enter_context(open_source(path))])
        for event in session.events():
            match event:
                case ErrorEvent():
                    raise RemoteStreamError(
                        event.message, offset=event.offset, section=event.section
                    )
                case HeaderEvent():
                    found.start = event.offset
                case SectionEvent():
                    found.has_footers = event.has_footer
                    if event.header.idstr != RAM_SECTION_IDSTR:
                        found.lengths.append(event.length)
                case DescriptionEvent():
                    found.text = event.text
    for capability, is_there in (
        ("mapped-ram", session.state.has_capability("mapped-ram")),
        ("checksum frames", bool(session.state.features)),
    ):
        if is_there:
            raise RemoteStreamError(f"a stream with {capability} is not rewritten", offset=0)
    return found


class _Out:
    """A Writer over a file."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.position = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._raw.write(data)
        self.position += len(data)


class _Rewriter:
    """The second pass."""

    def __init__(self, source: Source, out: Writer, survey: _Survey, edit: Edit | None) -> None:
        self._source = source
        self._out = out
        self._survey = survey
        self._edit = edit
        self._state = MigrationState()
        self._channel = RamChannel(self._state.ram.map)
        self._description: Description | None = None
        if survey.text is not None:
            self._description = parse_description(survey.text, 0)
        self._devices: list[DecodedDevice] = []

    def run(self) -> None:
        """From the header to the end of the description."""
        source, out = self._source, self._out
        read_file_header(source)
        write_file_header(out)
        if source.peek(1) == bytes([SectionType.CONFIGURATION]):
            read_section_type(source)
            self._state.configuration = read_configuration(source)
            write_configuration(out, self._state.configuration)
        while (kind := read_section_type(source)) is not SectionType.EOF:
            self._one(kind, out)
        write_end_of_stream(out)
        if self._survey.text is not None:
            read_section_type(source)
            read_vmdescription(source)
            write_vmdescription(out, self._new_description(self._survey.text))

    def _one(self, kind: SectionType, out: Writer) -> None:
        """One command or section."""
        if kind is SectionType.COMMAND:
            self._command(out)
            return
        header = read_section_header(self._source, kind, self._state.started)
        if header.idstr == RAM_SECTION_IDSTR:
            write_section_header(out, header)
            self._ram(kind, out)
        else:
            header = self._other(header, out)
        if self._survey.has_footers:
            check_footer(self._source, header)
            write_footer(out, header.section_id)

    def _command(self, out: Writer) -> None:
        command = read_command(self._source)
        if isinstance(command, PostcopyAdvise):
            self._state.page_sizes_summary = command.page_sizes_summary
        if not isinstance(command, Packaged):
            write_command(out, command)
            return
        inside = BytesWriter()
        with self._source.package(command.length):
            while self._source.remaining_in_package:
                self._one(read_section_type(self._source), inside)
        write_command(out, Packaged(len(inside.getvalue())))
        out.write(inside.getvalue())

    def _other(self, header: SectionHeader, out: Writer) -> SectionHeader:
        """A section that is not RAM's: decoded if it is described, else as it is."""
        head = BytesWriter()
        write_section_header(head, header)
        framing = head.position + (5 if self._survey.has_footers else 0)
        payload = self._source.read(self._survey.lengths.popleft() - framing)
        described = None
        in_package = self._source.remaining_in_package is not None
        if header.type is SectionType.FULL and self._description and not in_package:
            described = self._description.take(header.idstr, header.instance_id)
        if described is not None:
            device = decode_device(described.description, payload, section=header.idstr)
            if self._edit is not None:
                self._edit(device)
            self._devices.append(device)
            payload = encode_device(device)
            written = replace(header, idstr=device.name, instance_id=device.instance_id)
            write_section_header(out, written)
        else:
            write_section_header(out, header)
        out.write(payload)
        return header

    def _ram(self, kind: SectionType, out: Writer) -> None:
        state = self._state
        if kind is SectionType.START:
            state.ram.map.start(state.target_page_bytes)
            setup = read_ram_setup(
                self._source,
                page_sizes_summary=state.page_sizes_summary,
                has_addresses=state.has_capability("x-ignore-shared"),
            )
            for block in setup.blocks:
                state.ram.add(block)
            write_ram_setup(out, setup)
            return
        for record in iter_ram_records(self._source, self._channel, want_data=True):
            out.write(encode_record(record))

    def _new_description(self, text: bytes) -> bytes:
        if self._edit is None:
            return text
        configuration = parse_vmdesc(text).configuration
        page_size = parse_vmdesc(text).page_size
        if page_size is None and not self._devices:
            return text
        return describe_stream(
            [describe_device(each) for each in self._devices],
            page_size=self._state.target_page_bytes if page_size is None else page_size,
            configuration=None if configuration is None else json.dumps(configuration),
        )


def encode_record(record: RamRecord) -> bytes:
    """A RAM record's bytes, its page data included.

    :param record: from :func:`~migration.analyze.ram.iter_ram_records` with ``want_data``.
    """
    block = record.block
    if block is None:
        return record.kind.to_bytes(8, "big")
    name = block.idstr.encode()
    given = name if record.is_named else ffi.NULL
    buffer = ffi.new("uint8_t[]", _WORD_AND_NAME_MAX)
    length = lib.ramrec_encode(buffer, record.offset, int(record.kind), given, len(name))
    head = bytes(ffi.buffer(buffer, length))
    match record.kind:
        case RamFlag.ZERO:
            return head + b"\0"
        case RamFlag.PAGE:
            return head + record.payload
        case RamFlag.XBZRLE:
            size = len(record.payload).to_bytes(2, "big")
            return head + bytes([XBZRLE_ENCODING]) + size + record.payload
        case RamFlag.COMPRESS_PAGE:
            packed = zlib.compress(record.payload, _ZLIB_LEVEL)
            return head + len(packed).to_bytes(4, "big") + packed
    raise LocalStreamError(f"a {record.kind.name} record has no form of its own")
