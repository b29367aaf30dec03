"""Random descriptions and values: the way there and back, and every kind of damage on the way."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from migration.wire.errors import RemoteStreamError, TruncatedStreamError
from migration.wire.io import BytesReader, BytesWriter
from migration.wire.registry import StateRegistry
from migration.wire.vmdesc import (
    decode_device,
    describe_device,
    encode_device,
    parse_vmdesc,
    payload_length,
)
from migration.wire.vmstate import U8, U16, Array, StructArray, VMStateDescription
from tests.support.vmstate_objects import Object, describe, load, parsed_description, save
from tests.support.vmstate_strategies import described_objects

BASE = 0x1000
JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [None, -1, 0, 1, 3, 1 << 40, "", "uint8", "struct", "qtailq", [], {}, True]
)


@given(described_objects())
def test_what_is_loaded_is_what_was_saved(drawn: tuple[VMStateDescription, Any]) -> None:
    """Equal as an object, and equal as bytes when saved again."""
    vmsd, obj = drawn
    payload = save(vmsd, obj)
    loaded = load(vmsd, Object(), payload, vmsd.version_id)
    assert loaded == obj
    assert save(vmsd, loaded) == payload


@given(described_objects())
def test_loading_over_an_old_object_gives_the_new_one(
    drawn: tuple[VMStateDescription, Any],
) -> None:
    """In place, on top of what was there: a destination's devices are not blank either."""
    vmsd, obj = drawn
    payload = save(vmsd, obj)
    assert load(vmsd, copy.deepcopy(obj), payload, vmsd.version_id) == obj


@given(described_objects())
def test_description_takes_the_payload_apart_and_together(
    drawn: tuple[VMStateDescription, Any],
) -> None:
    vmsd, obj = drawn
    payload, text = describe(vmsd, obj)
    assert payload == save(vmsd, obj)
    description = parsed_description(text)
    assert payload_length(description) == len(payload)
    decoded = decode_device(description, payload)
    assert encode_device(decoded) == payload
    assert describe_device(decoded) == text


@given(described_objects(), st.data())
def test_truncation_asks_for_more_where_the_bytes_end(
    drawn: tuple[VMStateDescription, Any], data: st.DataObject
) -> None:
    """Or, where only optional things are missing, is found by whoever looks for the footer."""
    vmsd, obj = drawn
    payload = save(vmsd, obj)
    length = data.draw(st.integers(0, max(0, len(payload) - 1)))
    reader = BytesReader(payload[:length], base=BASE)
    try:
        vmsd.load(reader, Object(), vmsd.version_id)
    except RemoteStreamError as error:
        assert error.section == "dev"  # noqa: PT017 - either outcome is right
        assert BASE <= error.offset <= BASE + length  # noqa: PT017
        stopped, asked = error.offset, isinstance(error, TruncatedStreamError)
    else:
        stopped, asked = reader.position, False
    # A subsection cut before its whole name is there may as well be what follows the struct; then
    # the loader goes on, and either finds it unfit there or leaves it to the footer check.
    left = payload[stopped - BASE : length]
    assert asked or left == b"" or left[0] == 5


@given(described_objects(), st.data())
def test_flipped_bytes_load_or_fail_with_a_place(
    drawn: tuple[VMStateDescription, Any], data: st.DataObject
) -> None:
    """Nothing but a typed error comes out, and it names section and offset."""
    vmsd, obj = drawn
    payload = bytearray(save(vmsd, obj))
    for _ in range(data.draw(st.integers(1, 4))):
        if payload:
            at = data.draw(st.integers(0, len(payload) - 1))
            payload[at] ^= data.draw(st.integers(1, 255))
    load_hostile(vmsd, bytes(payload))


@given(described_objects(), st.binary(max_size=200))
def test_noise_loads_or_fails_with_a_place(
    drawn: tuple[VMStateDescription, Any], noise: bytes
) -> None:
    load_hostile(drawn[0], noise)


def load_hostile(vmsd: VMStateDescription, payload: bytes) -> None:
    """Load; either it works or the error is one of ours and says where."""
    reader = BytesReader(payload, base=BASE)
    try:
        vmsd.load(reader, Object(), vmsd.version_id)
    except RemoteStreamError as error:
        assert error.section == "dev"  # noqa: PT017 - either outcome is right
        assert BASE <= error.offset <= BASE + len(payload)  # noqa: PT017


@given(described_objects(), st.data())
def test_damaged_payload_or_description_never_confuses_the_decoder(
    drawn: tuple[VMStateDescription, Any], data: st.DataObject
) -> None:
    """Both are the peer's. If it still decodes, it encodes to exactly those bytes."""
    payload, text = describe(*drawn)
    damaged = bytearray(payload)
    if damaged:
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(0, 255))
    description = mutate(parsed_description(text), data)
    try:
        decoded = decode_device(description, bytes(damaged), offset=BASE)
    except RemoteStreamError as error:
        assert BASE <= error.offset <= BASE + len(damaged)  # noqa: PT017 - either outcome is right
    else:
        assert encode_device(decoded) == damaged
        again = decode_device(parsed_description(describe_device(decoded)), bytes(damaged))
        assert encode_device(again) == damaged


def mutate(value: Any, data: st.DataObject) -> Any:
    """Replace one thing somewhere inside, or an empty part by itself."""
    if isinstance(value, dict) and value:
        key = data.draw(st.sampled_from(sorted(value)))
        return {**value, key: mutate(value[key], data)}
    if isinstance(value, list) and value:
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], mutate(value[at], data), *value[at + 1 :]]
    return data.draw(JUNK)


@given(st.binary(max_size=300))
def test_trailer_of_noise_is_refused_or_parsed(noise: bytes) -> None:
    try:
        parse_vmdesc(noise)
    except RemoteStreamError as error:
        assert error.section == "vmdescription"  # noqa: PT017 - either outcome is right


# -- versions ------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 65535)), min_size=1, max_size=8),
    st.integers(1, 5),
)
def test_newest_loader_takes_every_older_version(
    grown: list[tuple[int, int]], version: int
) -> None:
    """Fields were added version by version; what the older side does not send stays as it was."""

    def program(newest: int) -> VMStateDescription:
        fields = tuple(
            U16(f"f{i}", version_id=since) for i, (since, _) in enumerate(grown) if since <= newest
        )
        return VMStateDescription(
            name="dev", version_id=newest, minimum_version_id=1, fields=fields
        )

    source = Object(**{f"f{i}": value for i, (_, value) in enumerate(grown)})
    payload = save(program(version), source)
    loaded = load(program(5), Object(**{f"f{i}": -1 for i in range(len(grown))}), payload, version)
    for i, (since, value) in enumerate(grown):
        assert getattr(loaded, f"f{i}") == (value if since <= version else -1)


@given(st.lists(st.integers(0, 255), max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_receiver_that_knows_more_subsections_loads_what_it_gets(
    values: list[int], sent: list[bool]
) -> None:
    def sub(number: int) -> VMStateDescription:
        return VMStateDescription(
            name=f"dev/s{number}",
            fields=(U8(f"s{number}"),),
            needed=lambda obj: getattr(obj, f"s{number}", None) is not None,
        )

    vmsd = VMStateDescription(
        name="dev",
        fields=(
            StructArray(
                "items", VMStateDescription(name="i", fields=(U8("a"),)), count=len(values)
            ),
        ),
        subsections=tuple(sub(number) for number in range(6)),
    )
    source = Object(items=[Object(a=value) for value in values])
    for number, present in enumerate(sent):
        setattr(source, f"s{number}", number if present else None)
    target = Object(items=[Object() for _ in values], **{f"s{n}": None for n in range(6)})
    assert load(vmsd, target, save(vmsd, source), 0) == source


# -- whole streams -------------------------------------------------------------------------------


@given(st.lists(described_objects(depth=1), min_size=1, max_size=4))
def test_a_machine_of_random_devices_goes_through_the_registry(
    drawn: list[tuple[VMStateDescription, Any]],
) -> None:
    """Sections, footers and the whole trailer; each section is cut by the trailer's lengths."""
    from migration.wire.headers import read_section_header, read_section_type

    source, destination = StateRegistry(), StateRegistry()
    loaded = []
    for vmsd, obj in drawn:
        source.register(vmsd, obj)
        loaded.append(Object())
        destination.register(vmsd, loaded[-1])
    writer = BytesWriter()
    saved = source.save_full_sections(writer, 0)
    trailer = parse_vmdesc(saved.vmdesc_json(page_size=4096))
    reader = BytesReader(writer.getvalue())
    for description in trailer.devices:
        header = read_section_header(reader, read_section_type(reader), {})
        start = reader.position
        destination.load_full_section(reader, header, with_footer=True)
        assert reader.position - 5 - start == payload_length(description)
    assert reader.remaining == 0
    assert loaded == [obj for _, obj in drawn]


# -- bounds --------------------------------------------------------------------------------------


class Endless(BytesReader):
    """A peer that never stops sending one byte."""

    def __init__(self, byte: int) -> None:
        super().__init__(b"")
        self._byte = byte
        self.sent = 0

    @property
    def position(self) -> int:
        return self.sent

    def read(self, length: int) -> bytes:
        self.sent += length
        return bytes([self._byte]) * length

    def peek(self, length: int) -> bytes:
        return bytes([self._byte]) * length


@given(described_objects(), st.integers(0, 255))
def test_endless_peer_is_cut_off(drawn: tuple[VMStateDescription, Any], byte: int) -> None:
    """Whatever it sends, a section comes to its end or is refused within bounds."""
    vmsd, _ = drawn
    reader = Endless(byte)
    try:
        vmsd.load(reader, Object(), vmsd.version_id)
    except RemoteStreamError as error:
        assert error.section == "dev"  # noqa: PT017 - either outcome is right
    assert reader.sent < 64 << 20


@given(st.integers(0, 255), st.integers(0, 5))
def test_data_behind_a_nested_struct_is_not_taken_for_a_subsection(mark: int, length: int) -> None:
    inner = VMStateDescription(name="inner", fields=(U8("a"),))
    vmsd = VMStateDescription(
        name="dev", fields=(StructArray("v", inner, count=1), Array("tail", length, U8))
    )
    obj = Object(v=[Object(a=5)], tail=[mark] * length)
    assert load(vmsd, Object(v=[Object()]), save(vmsd, obj), 0) == obj
