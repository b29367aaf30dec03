"""What Python reads off a stream, fed any bytes: a typed error with a place, or a result.

Knows nothing of the fuzzer: :mod:`tests.fuzz.loaders_fuzz` hands it to atheris, the tests hand it
the corpus and what hypothesis thinks of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from migration.analyze.events import EndEvent, ErrorEvent
from migration.wire import headers
from migration.wire.commands import read_command
from migration.wire.constants import SectionType
from migration.wire.devices.ide import IDE_DRIVE, IdeDrive
from migration.wire.devices.pckbd import PCKBD, IsaKeyboard
from migration.wire.errors import RemoteStreamError
from migration.wire.extension import DestinationHandshake, Feature
from migration.wire.globalstate import GLOBALSTATE, GlobalState
from migration.wire.io import BytesReader
from migration.wire.ram_setup import read_ram_setup
from migration.wire.return_path import read_received_bitmap, read_rp
from migration.wire.vmdesc import decode_device, describe_device, encode_device, parse_vmdesc
from migration.wire.vmstate import VMStateDescription
from tests.support.analyze_streams import analyse

_WITH_HEADER = (SectionType.START, SectionType.PART, SectionType.END, SectionType.FULL)
Loader = Callable[[BytesReader], object]


def _start(reader: BytesReader) -> None:
    headers.read_file_header(reader)
    headers.read_section_type(reader)
    headers.read_configuration(reader)


def _sections(reader: BytesReader) -> None:
    seen: dict[int, headers.SectionHeader] = {}
    while True:
        kind = headers.read_section_type(reader)
        if kind not in _WITH_HEADER:
            return
        header = headers.read_section_header(reader, kind, seen)
        headers.check_footer(reader, header)


def _commands(reader: BytesReader) -> None:
    while True:
        read_command(reader)


def _return_path(reader: BytesReader) -> None:
    while True:
        read_rp(reader)


def _handshake(reader: BytesReader) -> None:
    peer = DestinationHandshake(Feature.CHECKSUM | Feature.SPLIT_RUN)
    while True:
        at = reader.position
        peer.on_ping(int.from_bytes(reader.read(4), "big"), offset=at)


def _description(reader: BytesReader) -> None:
    offset = reader.position
    parse_vmdesc(headers.read_vmdescription(reader), offset=offset)


def _device(vmsd: VMStateDescription, make: Callable[[], object]) -> Loader:
    def load(reader: BytesReader) -> None:
        version_id = reader.read(1)[0]
        vmsd.load(reader, make(), version_id)

    return load


LOADERS: tuple[Loader, ...] = (
    _start,
    _sections,
    _commands,
    _return_path,
    _handshake,
    _description,
    read_ram_setup,
    lambda reader: read_ram_setup(reader, page_sizes_summary=0x201000),
    lambda reader: read_received_bitmap(reader, reader.read(1)[0] * 8),
    _device(IDE_DRIVE, IdeDrive),
    _device(PCKBD, IsaKeyboard),
    _device(GLOBALSTATE, GlobalState),
)


def one_input(data: bytes) -> None:
    """The first byte chooses the loader, or (its top bit) the analyser of whole streams, or (its
    top two bits) the decoder by a description.

    :raises Exception: anything but a :class:`RemoteStreamError`: that is a finding.
    """
    if not data:
        return
    if data[0] & 0xC0 == 0xC0:
        _described(data[1:])
        return
    if data[0] & 0x80:
        _analyse(data[1:])
        return
    reader = BytesReader(data[1:])
    with suppress(RemoteStreamError):
        LOADERS[data[0] % len(LOADERS)](reader)


def _described(data: bytes) -> None:
    """A trailer as JSON, a line end, a payload. What decodes is encoded to the same bytes, and
    described so that it decodes again.
    """
    text, _, payload = data.partition(b"\n")
    with suppress(RemoteStreamError):
        for description in parse_vmdesc(text).devices:
            device = decode_device(description, payload)
            assert encode_device(device) == payload
            again = parse_vmdesc(b'{"devices": [' + describe_device(device).encode() + b"]}")
            assert encode_device(decode_device(again.devices[0], payload)) == payload


def _analyse(data: bytes) -> None:
    """A stream header is put before it: the analyser must not stop at the first four bytes."""
    stream = b"QEVM\0\0\0\3" + data
    *_, last = analyse(stream)
    assert isinstance(last, EndEvent | ErrorEvent)
    assert 0 <= last.offset <= len(stream)
