"""Device sections out of recorded streams.

FULL sections carry no length. In a stream with a description they lie right before the end, and the
description says how long each is; in a postcopy package there is none, and a section of a device we
model is found by its header and ends where our own loader stops, at its footer.
"""

from __future__ import annotations

import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from migration.wire.constants import SectionType
from migration.wire.headers import (
    SectionHeader,
    check_footer,
    read_section_header,
    read_section_type,
)
from migration.wire.io import BytesReader
from migration.wire.vmdesc import DecodedStruct, StreamDescription, parse_vmdesc, payload_length

DATA = Path(__file__).parent.parent / "data"
VECTORS = Path(os.environ.get("POSTCOPY_VECTORS", DATA / "vectors"))
OWN_RECORDING = DATA / "vmstate_pc_pio_kbd.bin.xz"
"""See tests/data/vmstate_README.md."""


@dataclass(frozen=True)
class Section:
    """One FULL section: where its payload starts in the stream, and what is said about it."""

    header: SectionHeader
    description: dict[str, Any]
    offset: int
    payload: bytes


@dataclass(frozen=True)
class Described:
    """A stream that ends with a description."""

    name: str
    data: bytes
    json: bytes
    parsed: StreamDescription
    sections: tuple[Section, ...]


@cache
def read_vector(path: Path) -> bytes:
    """The bytes of a recording, unpacked."""
    return lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()


def source_streams() -> list[Path]:
    """Every recorded stream from a source, the extra channels included."""
    found = [path for path in VECTORS.rglob("*.bin*") if ".d2s." not in path.name]
    return [*sorted(found), OWN_RECORDING]


@cache
def described_streams() -> tuple[Described, ...]:
    """Every recorded stream that has a description."""
    return tuple(
        stream for path in source_streams() if (stream := described_stream(path)) is not None
    )


def described_stream(path: Path) -> Described | None:
    """One file, taken apart by the description at its end; None if it has none."""
    data = read_vector(path)
    at = max(data.rfind(b'{"configuration"'), data.rfind(b'{"page_size"'))
    if at < 6 or data[at - 6 : at - 4] != b"\x00\x06":
        return None
    length = int.from_bytes(data[at - 4 : at], "big")
    json = data[at : at + length]
    assert len(json) == length
    assert at + length == len(data)
    parsed = parse_vmdesc(json)
    footer_bytes = 0 if "nofooter" in path.name else 5
    total = sum(_header_bytes(device) + payload_length(device) for device in parsed.devices)
    start = at - 6 - total - footer_bytes * len(parsed.devices)
    reader = BytesReader(data[start : at - 6], base=start)
    sections = []
    for device in parsed.devices:
        header = read_section_header(reader, read_section_type(reader), {})
        assert header.type is SectionType.FULL
        offset = reader.position
        payload = reader.read(payload_length(device))
        if footer_bytes:
            check_footer(reader, header)
        sections.append(Section(header, device, offset, payload))
    assert reader.remaining == 0
    return Described(f"{path.parent.name}/{path.name}", data, json, parsed, tuple(sections))


def _header_bytes(device: dict[str, Any]) -> int:
    return 1 + 4 + 1 + len(device["name"]) + 4 + 4


def undescribed_sections(
    idstr: str, version_id: int
) -> Iterator[tuple[Path, SectionHeader, BytesReader]]:
    """Sections of that name in streams without a description, the reader at the payload.

    Found by the bytes of their header; a false find would fail the caller's footer check.
    """
    name = bytes([len(idstr)]) + idstr.encode() + bytes(4) + version_id.to_bytes(4, "big")
    described = {stream.name for stream in described_streams()}
    for path in source_streams():
        if f"{path.parent.name}/{path.name}" in described:
            continue
        data = read_vector(path)
        at = data.find(name)
        while at >= 0:
            if at >= 5 and data[at - 5] == SectionType.FULL:
                reader = BytesReader(memoryview(data)[at - 4 :], base=at - 4)
                yield path, read_section_header(reader, SectionType.FULL, {}), reader
            at = data.find(name, at + 1)


def structs_named(state: DecodedStruct, vmsd_name: str) -> Iterator[DecodedStruct]:
    """Every nested struct of that kind, in wire order."""
    for _, entry in state.walk():
        values = entry.value if isinstance(entry.value, list) else [entry.value]
        for value in values:
            if isinstance(value, DecodedStruct) and value.vmsd_name == vmsd_name:
                yield value


def struct_descriptions(description: dict[str, Any], vmsd_name: str) -> Iterator[dict[str, Any]]:
    """The descriptions of those structs, in the same order (arrays described once come once)."""
    for entry in description.get("fields", []):
        inner = entry.get("struct")
        if inner is not None:
            if inner.get("vmsd_name") == vmsd_name:
                yield inner
            yield from struct_descriptions(inner, vmsd_name)
    for sub in description.get("subsections", []):
        yield from struct_descriptions(sub, vmsd_name)
