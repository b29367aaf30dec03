"""Every recorded section that is described decodes without a byte left over, and encodes to the
same bytes.
"""

from __future__ import annotations

import json

import pytest

from migration.wire.constants import SectionType
from migration.wire.headers import (
    read_configuration,
    read_file_header,
    read_section_type,
    write_configuration,
)
from migration.wire.io import BytesReader, BytesWriter
from migration.wire.vmdesc import (
    DecodedField,
    DecodedStruct,
    decode_device,
    describe_configuration,
    describe_stream,
    encode_device,
    payload_length,
)
from tests.support.vmstate_vectors import Described, Section, described_streams

STREAMS = described_streams()
SECTIONS = [
    pytest.param(section, id=f"{stream.name}:{section.header.idstr}:{section.header.instance_id}")
    for stream in STREAMS
    for section in stream.sections
]


def test_there_is_something_to_prove() -> None:
    """The finder of descriptions did not quietly find nothing."""
    assert {stream.name.split("/")[0] for stream in STREAMS} >= {
        "qemu-7.2",
        "qemu-10.0",
        "qemu-11.1",
    }
    assert len(STREAMS) >= 15
    assert len(SECTIONS) >= 136


@pytest.mark.parametrize("section", SECTIONS)
def test_section_decodes_and_encodes_identically(section: Section) -> None:
    assert section.description["name"] == section.header.idstr
    assert section.description["instance_id"] == section.header.instance_id
    assert payload_length(section.description) == len(section.payload)
    device = decode_device(section.description, section.payload, offset=section.offset)
    assert device.state.version == section.header.version_id
    assert encode_device(device) == section.payload


@pytest.mark.parametrize("section", SECTIONS)
def test_fields_cover_the_payload_without_gap_or_overlap(section: Section) -> None:
    """The leaves, in wire order, are the payload but for the headers of subsections."""
    device = decode_device(section.description, section.payload)
    at = _covered(device.state, 0, section.payload)
    assert at == len(section.payload)


def _covered(state: DecodedStruct, at: int, payload: bytes) -> int:
    assert state.offset == at
    for entry in state.fields:
        assert entry.offset == at
        assert payload[at : at + len(entry.raw)] == entry.raw
        at = _field_covered(entry, at, payload)
    for sub in state.subsections:
        name = sub.vmsd_name.encode()
        head = bytes([5, len(name)]) + name + sub.version.to_bytes(4, "big")
        assert payload[at : at + len(head)] == head
        at = _covered(sub, at + len(head), payload)
    assert at == state.offset + state.length
    return at


def _field_covered(entry: DecodedField, at: int, payload: bytes) -> int:
    end = at + len(entry.raw)
    values = entry.value if entry.array_len is not None else [entry.value]
    assert isinstance(values, list)
    for value in values:
        if isinstance(value, DecodedStruct):
            at = _covered(value, at, payload)
    assert at in (entry.offset, end)
    return end


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
def test_description_is_written_as_qemu_writes_it(stream: Described) -> None:
    """Same separators, same order, configuration first: put together from its parts, it is the
    same text.
    """
    devices = [json.dumps(device) for device in json.loads(stream.json)["devices"]]
    configuration = json.loads(stream.json).get("configuration")
    text = None if configuration is None else json.dumps(configuration)
    assert describe_stream(devices, page_size=4096, configuration=text) == stream.json
    assert stream.parsed.page_size == 4096


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
def test_configuration_object_matches_the_configuration_section(stream: Described) -> None:
    """QEMU 9.0 and newer describe the CONFIGURATION section; ours of the same section is the same
    text, and the section decodes with it."""
    begin = stream.data.index(b"QEVM")  # a file may begin with space for others
    reader = BytesReader(stream.data[begin : begin + 4096])
    read_file_header(reader)
    if read_section_type(reader) is not SectionType.CONFIGURATION:
        assert stream.parsed.configuration is None
        return
    start = reader.position
    configuration = read_configuration(reader)
    ours = describe_configuration(configuration)
    if stream.parsed.configuration is not None:
        assert json.dumps(stream.parsed.configuration) == ours
    writer = BytesWriter()
    write_configuration(writer, configuration)
    payload = stream.data[begin + start : begin + reader.position]
    assert writer.getvalue()[1:] == payload
    device = decode_device(json.loads(ours), payload)
    assert device.state["name"] == configuration.machine.encode()
    assert encode_device(device) == payload


def test_values_are_interpreted() -> None:
    """Spot checks of values known from how the stream was made."""
    stream = next(s for s in STREAMS if s.name.endswith("pc-devices-paused-tcg-8m.bin.xz"))
    by_name = {
        section.header.idstr: decode_device(section.description, section.payload)
        for section in stream.sections
    }
    run_state = by_name["globalstate"].state["runstate"]
    assert isinstance(run_state, bytes)
    assert run_state.rstrip(b"\0") == b"prelaunch"
    registers = by_name["cpu"].state["env.regs"]
    assert isinstance(registers, list)
    assert len(registers) == 16
    assert by_name["cpu"].state["env.eip"] == 0xFFF0
    paths = dict(by_name["pckbd"].walk())
    assert paths["kbd.pckbd/extended_state.obsrc"].type == "uint32"


def test_a_changed_value_changes_only_its_bytes() -> None:
    stream = next(s for s in STREAMS if s.name.endswith("pc-running-kvm-8m.bin.xz"))
    section = next(s for s in stream.sections if s.header.idstr == "cpu")
    device = decode_device(section.description, section.payload)
    entry = next(entry for entry in device.fields if entry.name == "env.eip")
    entry.value = 0x1122334455667788
    changed = encode_device(device)
    assert changed[entry.offset : entry.offset + 8].hex() == "1122334455667788"
    assert changed[: entry.offset] == section.payload[: entry.offset]
    assert changed[entry.offset + 8 :] == section.payload[entry.offset + 8 :]
