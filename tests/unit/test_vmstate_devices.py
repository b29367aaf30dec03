"""Our descriptions of QEMU's devices against the bytes and descriptions a real QEMU wrote for
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from migration.wire.devices.ide import IDE_DRIVE, IO_BUFFER_BYTES, IdeDrive
from migration.wire.devices.pckbd import PCKBD, IsaKeyboard, Pending, Status
from migration.wire.errors import LocalStreamError, RemoteStreamError
from migration.wire.globalstate import GLOBALSTATE, GLOBALSTATE_BEFORE_9_0, RUN_STATES, GlobalState
from migration.wire.headers import check_footer
from migration.wire.io import BytesReader, BytesWriter
from migration.wire.timer import TIMER, TimerState
from migration.wire.vmdesc import decode_device
from migration.wire.vmstate import JsonText, VMStateDescription
from tests.support.vmstate_vectors import (
    Section,
    described_streams,
    read_vector,
    struct_descriptions,
    structs_named,
    undescribed_sections,
)

SECTIONS = [section for stream in described_streams() for section in stream.sections]


def described(name: str) -> list[Section]:
    found = [section for section in SECTIONS if section.header.idstr == name]
    assert found
    return found


def save(vmsd: VMStateDescription, obj: object) -> tuple[bytes, dict[str, Any]]:
    """Payload and description of ``obj``."""
    writer, text = BytesWriter(), JsonText()
    text.start_object()
    vmsd.save(writer, obj, description=text)
    text.end_object()
    return writer.getvalue(), json.loads(text.text())


def load(vmsd: VMStateDescription, obj: object, payload: bytes, version_id: int) -> None:
    """Load and insist that every byte was taken."""
    reader = BytesReader(payload)
    vmsd.load(reader, obj, version_id)
    assert reader.remaining == 0


def form_of(section: Section) -> VMStateDescription:
    """The globalstate description of the QEMU that wrote the section."""
    return GLOBALSTATE if len(section.description["fields"]) > 2 else GLOBALSTATE_BEFORE_9_0


CASES: list[tuple[str, Callable[[Section], VMStateDescription], Callable[[], object]]] = [
    ("timer", lambda section: TIMER, TimerState),
    ("globalstate", form_of, GlobalState),
    ("pckbd", lambda section: PCKBD, IsaKeyboard),
]


@pytest.mark.parametrize(
    ("section", "vmsd", "new"),
    [
        pytest.param(section, vmsd(section), new, id=f"{name}-{number}")
        for name, vmsd, new in CASES
        for number, section in enumerate(described(name))
    ],
)
def test_section_loads_and_saves_identically(
    section: Section, vmsd: VMStateDescription, new: Callable[[], object]
) -> None:
    """Bytes and description are QEMU's own."""
    obj = new()
    load(vmsd, obj, section.payload, section.header.version_id)
    payload, description = save(vmsd, obj)
    assert payload == section.payload
    expected = {
        key: section.description[key]
        for key in ("vmsd_name", "version", "fields", "subsections")
        if key in section.description
    }
    assert json.dumps(description) == json.dumps(expected)


@pytest.mark.parametrize(
    ("name", "vmsd", "new", "at_least"),
    [
        ("timer", TIMER, TimerState, 8),
        ("globalstate", GLOBALSTATE, GlobalState, 8),
        ("pckbd", PCKBD, IsaKeyboard, 3),
    ],
)
def test_section_of_a_postcopy_package_loads_and_saves_identically(
    name: str, vmsd: VMStateDescription, new: Callable[[], object], at_least: int
) -> None:
    """No description says where these end; our loader stops exactly at the footer."""
    count = 0
    for path, header, reader in undescribed_sections(name, vmsd.version_id):
        obj = new()
        start = reader.position
        vmsd.load(reader, obj, header.version_id)
        end = reader.position
        check_footer(reader, header)
        writer = BytesWriter()
        vmsd.save(writer, obj)
        original = read_vector(path)[start:end]
        if name == "globalstate" and original[36] == 0:
            writer = BytesWriter()  # written by a QEMU that did not know the flag
            GLOBALSTATE_BEFORE_9_0.save(writer, obj)
        assert writer.getvalue() == original
        count += 1
    assert count >= at_least


def test_both_forms_of_globalstate_are_the_same_bytes_but_for_the_flag() -> None:
    """The 7.2 form writes zeros where the 9.0 form says that it knows about suspending."""
    new, _ = save(GLOBALSTATE, GlobalState("paused"))
    old, _ = save(GLOBALSTATE_BEFORE_9_0, GlobalState("paused"))
    assert len(new) == len(old) == 104
    assert [at for at in range(104) if new[at] != old[at]] == [36]
    for payload in (new, old):
        for vmsd in (GLOBALSTATE, GLOBALSTATE_BEFORE_9_0):
            state = GlobalState()
            load(vmsd, state, payload, 1)
            assert (state.run_state, state.received) == ("paused", True)
            assert not state.start_on_load()


@pytest.mark.parametrize("name", sorted(RUN_STATES))
def test_every_run_state_survives(name: str) -> None:
    payload, _ = save(GLOBALSTATE, GlobalState(name))
    assert payload[:4] == (len(name) + 1).to_bytes(4, "big")
    state = GlobalState()
    load(GLOBALSTATE, state, payload, 1)
    assert state.run_state == name
    assert state.start_on_load() == (name == "running")
    assert state.vm_was_suspended == (name == "suspended")


def test_unknown_run_state_is_refused() -> None:
    payload, _ = save(GLOBALSTATE, GlobalState("running"))
    with pytest.raises(RemoteStreamError, match="'bunning' is not a run state") as caught:
        load(GLOBALSTATE, GlobalState(), payload.replace(b"running", b"bunning"), 1)
    assert caught.value.section == "globalstate"
    with pytest.raises(LocalStreamError, match="'walking' is not a run state"):
        save(GLOBALSTATE, GlobalState("walking"))


def test_globalstate_of_old_machine_types_is_left_out() -> None:
    state = GlobalState("running")
    assert GLOBALSTATE.is_needed(state)
    state.always_send = False
    assert not GLOBALSTATE.is_needed(state)
    state.run_state = "prelaunch"
    assert GLOBALSTATE.is_needed(state)
    assert GlobalState().start_on_load()


def test_timer_of_version_1_has_no_clock_offset() -> None:
    state = TimerState(1, 2)
    load(TIMER, state, (-5).to_bytes(8, "big", signed=True) + bytes(8), 1)
    assert state == TimerState(-5, 2)


# -- the keyboard controller ---------------------------------------------------------------------


def recorded_keyboard() -> IsaKeyboard:
    """From our own recording: output port written, self-test answer waiting."""
    keyboard = IsaKeyboard()
    load(PCKBD, keyboard, described("pckbd")[-1].payload, 3)
    return keyboard


def test_recorded_output_port_came_in_its_subsection() -> None:
    kbd = recorded_keyboard().kbd
    assert kbd.outport_present
    assert kbd.outport == 0xDD
    assert kbd.status & Status.OUTPUT_FULL
    assert (kbd.cbdata, kbd.extended_state_loaded) == (0x55, True)


def test_absent_output_port_is_derived_from_the_status() -> None:
    source = IsaKeyboard()
    source.kbd.status = Status.OUTPUT_FULL | Status.MOUSE_OUTPUT_FULL
    source.kbd.outport = source.kbd.outport_default()
    payload, _ = save(PCKBD, source)
    assert b"pckbd_outport" not in payload
    destination = IsaKeyboard()
    destination.kbd.outport = 0
    load(PCKBD, destination, payload, 3)
    assert destination.kbd.outport == 0xCF | 0x30
    assert not destination.kbd.outport_present


def test_old_machine_type_sends_coarse_flags_and_no_extended_state() -> None:
    source = IsaKeyboard()
    source.kbd.extended_state = False
    source.kbd.status = Status.OUTPUT_FULL
    source.kbd.outport = source.kbd.outport_default()
    source.kbd.pending = Pending.KEYBOARD | Pending.CONTROLLER_MOUSE
    payload, _ = save(PCKBD, source)
    assert payload == bytes([0, 1, 0, Pending.KEYBOARD_COMPAT])
    destination = IsaKeyboard()
    load(PCKBD, destination, payload, 3)
    assert destination.kbd.pending == Pending.KEYBOARD
    assert destination.kbd.obsrc == 1


def test_throttle_timer_travels_as_a_flag() -> None:
    source = IsaKeyboard()
    source.kbd.throttle_pending = True
    payload, _ = save(PCKBD, source)
    destination = IsaKeyboard()
    load(PCKBD, destination, payload, 3)
    assert destination.kbd.throttle_pending


# -- the IDE drive -------------------------------------------------------------------------------


def recorded_drives() -> list[tuple[bytes, dict[str, Any]]]:
    """Payload and description of every drive in every recorded IDE controller."""
    drives = []
    for section in described("0000:00:01.1/ide"):
        device = decode_device(section.description, section.payload)
        states = list(structs_named(device.state, "ide_drive"))
        texts = list(struct_descriptions(section.description, "ide_drive"))
        assert len(states) == len(texts) == 4
        for state, text in zip(states, texts, strict=True):
            drives.append((section.payload[state.offset : state.offset + state.length], text))
    return drives


@pytest.mark.parametrize("number", range(len(recorded_drives())))
def test_drive_loads_and_saves_identically(number: int) -> None:
    payload, description = recorded_drives()[number]
    drive = IdeDrive()
    load(IDE_DRIVE, drive, payload, 3)
    saved, ours = save(IDE_DRIVE, drive)
    assert saved == payload
    assert json.dumps(ours) == json.dumps(description)


def test_recorded_drive_is_in_the_middle_of_a_transfer() -> None:
    """The recipe: 100 words of the first of 3 sectors were read."""
    drives = [IdeDrive() for _ in recorded_drives()]
    for drive, (payload, _) in zip(drives, recorded_drives(), strict=True):
        load(IDE_DRIVE, drive, payload, 3)
    busy = [drive for drive in drives if drive.in_pio_transfer]
    assert len(busy) == 1
    assert busy[0].identify_set
    assert b"OPTSOCYP" in busy[0].identify_data  # the serial number, bytes of each word swapped
    assert (busy[0].data_start, busy[0].data_end) == (200, 512)
    assert busy[0].end_transfer == "sector-read"
    assert len(busy[0].io_buffer) == IO_BUFFER_BYTES


def test_pio_state_is_sent_only_during_a_transfer() -> None:
    idle, _ = save(IDE_DRIVE, IdeDrive())
    assert len(idle) == 28
    retried = IdeDrive()
    retried.bus.error_status = 0x10
    waiting, description = save(IDE_DRIVE, retried)
    assert waiting.startswith(idle + b"\x05\x13ide_drive/pio_state\x00\x00\x00\x01")
    field = description["subsections"][0]["fields"][1]
    assert field == {"name": "io_buffer", "array_len": 131076, "type": "uint8", "size": 1}


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (8, 6, "end_transfer_fn_idx 6 means nothing"),
        (7, 0x7F, "outside the I/O buffer"),
        (0, 0xFF, "outside the I/O buffer"),
    ],
)
def test_hostile_pio_state_is_refused(at: int, value: int, reason: str) -> None:
    """``at`` counts from cur_io_buffer_offset, which lies behind the buffer."""
    drive = IdeDrive(status=0x58, data_start=4, data_end=512)
    payload, _ = save(IDE_DRIVE, drive)
    start = len(payload) - 4 - 4 - 1 - 4 - 4
    damaged = bytearray(payload)
    damaged[start + at] = value
    if at == 7:
        damaged[start + 5] = value
    with pytest.raises(RemoteStreamError, match=reason) as caught:
        load(IDE_DRIVE, IdeDrive(), bytes(damaged), 3)
    assert caught.value.section == "ide_drive"
    assert "ide_drive/pio_state" in str(caught.value)


def test_drive_of_version_2_has_no_cdrom_changed() -> None:
    payload, _ = save(IDE_DRIVE, IdeDrive(cdrom_changed=1))
    drive = IdeDrive(cdrom_changed=7)
    load(IDE_DRIVE, drive, payload[:27], 2)
    assert drive.cdrom_changed == 7


def test_conditional_field_follows_a_field_loaded_before() -> None:
    source = IdeDrive(identify_set=1, identify_data=bytes(170) + b"\x20" + bytes(341))
    payload, _ = save(IDE_DRIVE, source)
    assert len(payload) == 28 + 512
    destination = IdeDrive(write_cache=False)
    load(IDE_DRIVE, destination, payload, 3)
    assert destination.write_cache


def test_optical_drive_sends_tray_and_media_events() -> None:
    source = IdeDrive(tray_open=True, new_media=True)
    payload, description = save(IDE_DRIVE, source)
    assert [sub["vmsd_name"] for sub in description["subsections"]] == [
        "ide_drive/tray_state",
        "ide_drive/atapi/gesn_state",
    ]
    destination = IdeDrive()
    load(IDE_DRIVE, destination, payload, 3)
    assert (destination.tray_open, destination.new_media, destination.eject_request) == (
        True,
        True,
        False,
    )
