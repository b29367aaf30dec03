"""A QEMU's stream, decoded and encoded again by us, is loaded by that QEMU and the guest goes on;
what it does not know in it, it refuses by name, as it would from anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migration.analyze.events import EndEvent
from migration.analyze.rewrite import Edit, rewrite_stream
from migration.analyze.session import Session
from migration.analyze.source import open_source
from migration.wire.devices.ide import IDE_DRIVE, IdeDrive
from migration.wire.devices.pckbd import PCKBD, IsaKeyboard
from migration.wire.io import BytesReader, BytesWriter
from migration.wire.vmdesc import DecodedDevice, DecodedField, DecodedStruct, decode_device
from migration.wire.vmstate import VMStateDescription
from tests.support.guest_image import GuestLayout
from tests.support.guest_vm import GuestOptions, GuestVM
from tests.support.qemu import MIB, PAGE_BYTES, Qemu, QemuBinary, pattern, qemu_binary
from tests.support.vmstate_vectors import described_stream, structs_named

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

__all__ = ["qemu_binary"]

_RAM = 4 * MIB
_PC = GuestOptions(GuestLayout(32 * MIB, stride=65536), machine="pc-i440fx-7.2")


def save(qemu: Qemu, path: Path) -> None:
    """The whole VM into a file."""
    qemu.set_capabilities()
    qemu.execute("migrate", uri=f"exec:cat > {path}")
    qemu.wait_status("completed")


def rewrite(path: Path, edit: Edit | None = None) -> Path:
    """Our own writing of it, which without an edit is the very same."""
    other = path.with_suffix(".new")
    with open(other, "wb") as out:
        rewrite_stream(path, out, edit)
    if edit is None:
        assert other.read_bytes() == path.read_bytes()
    return other


def load(qemu: Qemu, path: Path) -> None:
    """Begin; how it ends is the test's."""
    qemu.set_capabilities()
    qemu.execute("migrate-incoming", uri=f"exec:cat {path}")


def leave(device: DecodedDevice) -> None:
    """Changes nothing, but has everything described anew."""


def assert_explained(path: Path) -> None:
    """The analyser leaves no byte of it over."""
    with open_source(str(path)) as source:
        *_, end = Session([source]).events()
    assert isinstance(end, EndEvent), end
    assert (end.offset, end.trailing) == (path.stat().st_size, 0)


@pytest.mark.parametrize("edit", [None, leave], ids=["as it is", "described anew"])
def test_none_goes_on(tmp_path: Path, qemu_binary: QemuBinary, edit: Edit | None) -> None:
    path, ram = tmp_path / "saved", pattern(_RAM // PAGE_BYTES)
    with Qemu(qemu_binary, ram_bytes=_RAM, load={0: ram}) as qemu:
        save(qemu, path)
    assert_explained(path)
    with Qemu(qemu_binary, ram_bytes=_RAM, incoming="defer") as qemu:
        load(qemu, rewrite(path, edit))
        qemu.wait_status("completed")
        assert qemu.ram() == ram
        assert qemu.execute("query-status")["status"] == "running"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the saved VMs of this module lie."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def saved_pc(folder: Path, tmp_path: Path, qemu_binary: QemuBinary) -> Path:
    """A pc whose guest was at work, saved while it stood still: 7.2 with TCG loses pages else."""
    path = folder / qemu_binary.name
    if not path.exists():
        with GuestVM(qemu_binary, _PC) as vm:
            vm.serial.wait_passes(2)
            vm.execute("stop")
            save(vm, path)
    mine = tmp_path / "saved"
    mine.symlink_to(path)
    return mine


def test_pc_goes_on(saved_pc: Path, qemu_binary: QemuBinary) -> None:
    """Some thirty devices; the guest checks all its memory afterwards."""
    assert_explained(saved_pc)
    for edit in (None, leave):
        with GuestVM(qemu_binary, _PC, incoming="defer") as vm:
            load(vm, rewrite(saved_pc, edit))
            vm.wait_status("completed")
            assert vm.run_state() == "paused"
            vm.execute("cont")
            vm.assert_runs_clean()


def test_our_own_descriptions_read_what_this_qemu_saved(saved_pc: Path) -> None:
    """Keyboard controller and IDE drives, written in our VMState: loaded, and saved to the same
    bytes."""
    stream = described_stream(saved_pc)
    assert stream is not None
    by_name = {each.header.idstr: each for each in stream.sections}
    keyboard = by_name["pckbd"]
    assert saved_again(PCKBD, IsaKeyboard(), keyboard.payload, 3) == keyboard.payload
    controller = by_name["0000:00:01.1/ide"]
    device = decode_device(controller.description, controller.payload)
    drives = list(structs_named(device.state, "ide_drive"))
    assert len(drives) == 4
    for drive in drives:
        payload = controller.payload[drive.offset : drive.offset + drive.length]
        assert saved_again(IDE_DRIVE, IdeDrive(), payload, 3) == payload


def saved_again(vmsd: VMStateDescription, obj: object, payload: bytes, version_id: int) -> bytes:
    reader, writer = BytesReader(payload), BytesWriter()
    vmsd.load(reader, obj, version_id)
    assert reader.remaining == 0
    vmsd.save(writer, obj)
    return writer.getvalue()


def test_a_changed_value_is_what_the_qemu_has(saved_pc: Path, qemu_binary: QemuBinary) -> None:
    """The stream says that the guest was running, so it starts by itself; its clock chip has our
    byte."""

    def change(device: DecodedDevice) -> None:
        if device.name == "globalstate":
            device.state["runstate"] = set_start(device.state["runstate"], b"running\0")
        if device.name == "mc146818rtc":
            cmos = device.state["cmos_data"]
            assert isinstance(cmos, bytes)
            device.state["cmos_data"] = cmos[:0x70] + b"\xa5" + cmos[0x71:]

    with GuestVM(qemu_binary, _PC, incoming="defer") as vm:
        load(vm, rewrite(saved_pc, change))
        vm.wait_status("completed")
        vm.assert_runs_clean()
        vm.execute("human-monitor-command", command_line="o/b 0x70 0x70")
        answer = vm.execute("human-monitor-command", command_line="i/b 0x71")
        assert "0xa5" in answer.lower()


def set_start(value: object, start: bytes) -> bytes:
    assert isinstance(value, bytes)
    return start + value[len(start) :]


def _unknown_device(device: DecodedDevice) -> None:
    if device.name == "pckbd":
        device.name = "pckbe"


def _unknown_instance(device: DecodedDevice) -> None:
    if device.name == "pckbd":
        device.instance_id = 9


def _unknown_subsection(device: DecodedDevice) -> None:
    if device.name == "pckbd":
        extra = DecodedField("note", "uint32", 0, b"", 7, 4)
        device.state.subsections.append(DecodedStruct("pckbd/more", 1, 0, [extra]))


def _unknown_field(device: DecodedDevice) -> None:
    if device.name == "pckbd":
        device.state.fields.append(DecodedField("note", "uint32", 0, b"", 7, 4))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_unknown_device, "Unknown savevm section or instance 'pckbe' 0"),
        (_unknown_instance, "Unknown savevm section or instance 'pckbd' 9"),
        # Names beginning so belong to the struct at its end, which has the same name.
        (_unknown_subsection, "Failed to load pckbd:kbd"),
        (_unknown_field, "Missing section footer for pckbd"),
    ],
    ids=["device", "instance", "subsection", "field"],
)
def test_what_it_does_not_know_is_refused(
    saved_pc: Path, qemu_binary: QemuBinary, edit: Callable[[DecodedDevice], None], says: str
) -> None:
    """With QEMU's own message, which names the section."""
    with GuestVM(qemu_binary, _PC, incoming="defer") as vm:
        load(vm, rewrite(saved_pc, edit))
        assert vm.wait_exit(timeout_s=60) != 0
        assert says in vm.stderr()
