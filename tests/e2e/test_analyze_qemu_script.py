"""Our field values are those of QEMU's own analysis script, on every stream it can read.

It knows files written by a plain precopy only: no commands (10.0's: but SWITCHOVER_START), no
compression, no page sizes. The script of each version reads recordings, and streams that a QEMU
with many devices writes here and now.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migration.analyze.events import EndEvent, Event, RamBlockEvent, SectionEvent
from migration.analyze.rewrite import rewrite_stream
from migration.analyze.session import Session
from migration.analyze.source import open_source
from migration.commands.main import main
from migration.wire.constants import SectionType
from tests.support.analyze_vectors import content, recordings
from tests.support.need import need
from tests.support.qemu import MIB, Qemu, installed_qemu, newer_qemu
from tests.support.qemu_script import SUITES, analysis_script

_PLAIN = ("zero-1m", "pattern-2m", "noconfig-nofooter", "running-kvm", "devices-paused")
_MULTIFD = "multifd-"
_INTEGER = re.compile(r"0x([0-9a-f]+)(?: \((-\d+)\))?")
_WIDTHS = (1, 2, 4, 8)

# Devices whose state has every kind of field there is: arrays of structs, lists, timers, bitmaps,
# pointers, subsections, helpers, custom encodings.
_DEVICES = (
    *("virtio-net-pci,romfile=", "virtio-blk-pci,drive=disk", "e1000,romfile="),
    *("rtl8139,romfile=", "vmxnet3,romfile=", "pcnet,romfile=", "nec-usb-xhci", "usb-ehci"),
    *("usb-tablet", "ich9-ahci", "intel-hda", "hda-duplex,audiodev=none", "virtio-serial-pci"),
    *("virtconsole,chardev=null", "VGA,romfile=", "lsi53c895a", "virtio-scsi-pci", "am53c974"),
    *("virtio-balloon-pci", "virtio-rng-pci", "virtio-keyboard-pci", "megasas", "pvscsi"),
    *("i6300esb", "pci-bridge,chassis_nr=3", "tpci200", "edu", "sb16,audiodev=none"),
)
_BACKENDS = (
    *("-audiodev", "none,id=none", "-chardev", "null,id=null"),
    *("-drive", "if=none,id=disk,driver=null-co,read-zeroes=on,size=1M"),
)


def readable() -> list[Any]:
    """Script version and recording: those the script copes with."""
    found = []
    for each in recordings():
        is_plain = any(part in each.name for part in _PLAIN)
        # The main channel of a multifd migration is a plain stream with hardly any page.
        is_main = _MULTIFD in each.name and "postcopy" not in each.name and each.to_source
        for version in SUITES:
            if (is_plain or is_main) and (each.version == "7.2" or version == "10.0"):
                found.append(pytest.param(version, each, id=f"script-{version}-{each.id}"))
    return found


def test_there_is_something_to_compare() -> None:
    """Both scripts get streams of their own version at least."""
    pairs = {(each.values[0], each.values[1].version) for each in readable()}
    assert pairs >= {("7.2", "7.2"), ("10.0", "10.0"), ("10.0", "7.2")}


@pytest.mark.parametrize(("version", "recording"), readable())
def test_every_field_agrees(version: str, recording: Any, tmp_path: Path) -> None:
    """Same sections, same fields, same values; RAM blocks of the same size."""
    stream = tmp_path / "stream"
    stream.write_bytes(content(recording.to_destination[0]))
    assert_agreement(analysis_script(version), stream)


SavedMachine = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedMachine:
    """``saved(version, machine)``: a stream of that QEMU, written once."""
    folder = tmp_path_factory.mktemp("saved")

    def find(version: str, machine: str) -> Path:
        path = folder / f"{version}-{machine}"
        if not path.exists():
            save_machine(version, machine, path)
        return path

    return find


@pytest.mark.interop
@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("version", list(SUITES))
def test_a_machine_full_of_devices(version: str, machine: str, saved: SavedMachine) -> None:
    """Written by that QEMU now: some sixty sections and tens of thousands of values. Ours encode to
    the same bytes, and are described in the same words."""
    script = analysis_script(version)
    stream = saved(version, machine)
    assert assert_agreement(script, stream) > 20_000
    again = io.BytesIO()
    rewrite_stream(stream, again, lambda device: None)
    assert again.getvalue() == stream.read_bytes()


@pytest.mark.interop
@pytest.mark.parametrize("version", list(SUITES))
def test_ram_agrees(version: str, saved: SavedMachine, tmp_path: Path) -> None:
    """Every block the script extracts is, byte for byte, what ``--dump-ram`` writes."""
    script = analysis_script(version)
    stream = saved(version, "pc")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    command = [sys.executable, str(script), "-f", str(stream), "-x"]
    subprocess.run(command, cwd=theirs, capture_output=True, timeout=120, check=True)
    extracted = {str(each.relative_to(theirs)): each for each in theirs.rglob("*")}
    dumps: list[tuple[str, Path, Path]] = []
    with open_source(str(stream)) as source:
        for event in Session([source]).events():
            if isinstance(event, RamBlockEvent):
                name = event.block.idstr.lstrip("/")  # /rom@... is extracted to ./rom@...
                out = tmp_path / f"ours-{len(dumps)}"
                dumps.append((event.block.idstr, out, extracted[name]))
    assert len(dumps) >= 5
    words = [str(word) for idstr, out, _ in dumps for word in ("--dump-ram", idstr, out)]
    assert main(["analyze", str(stream), *words]) == 0
    for idstr, out, path in dumps:
        assert out.read_bytes() == path.read_bytes(), idstr


def save_machine(version: str, machine: str, path: Path) -> None:
    """The stream of that QEMU with all the devices, its guest never started."""
    binaries = [each for each in (installed_qemu(), newer_qemu()) if each is not None]
    found = [each for each in binaries if ".".join(map(str, each.version)) == version]
    need(found, f"no QEMU {version} here (`make qemu-10` unpacks 10.0)")
    args = [*_BACKENDS, "-S"]
    for device in _DEVICES:
        args += ["-device", device]
    with Qemu(found[0], machine=machine, ram_bytes=16 * MIB, args=args) as qemu:
        qemu.set_capabilities()
        qemu.execute("migrate", uri=f"exec:cat > {path}")
        qemu.wait_status("completed")


def assert_agreement(script: Path, stream: Path) -> int:
    """Compare the script's whole output with ours; how many values were compared."""
    command = [sys.executable, str(script), "-f", str(stream)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    theirs = json.loads(done.stdout)
    with open_source(str(stream)) as source:
        events = list(Session([source]).events())
    end = events[-1]
    assert isinstance(end, EndEvent)
    assert (end.offset, end.trailing) == (stream.stat().st_size, 0)
    ours = dict(our_sections(events))
    assert list(ours) == list(theirs)
    compared = 0
    for name, section in theirs.items():
        for path, equal in compare(ours[name], section, name):
            compared += 1
            assert equal, path
    assert compared >= 2 * len(theirs)
    return compared


def our_sections(events: list[Event]) -> Iterator[tuple[str, object]]:
    """Sections under the names the script gives them."""
    for event in events:
        if not isinstance(event, SectionEvent):
            continue
        key = f"{event.header.idstr} ({event.header.section_id})"
        if event.device is not None:
            yield key, event.device
        elif event.header.type is SectionType.START and event.live is not None:
            blocks = event.live["blocks"]
            assert isinstance(blocks, list)
            yield key, {"section sizes": {each["name"]: each["length"] for each in blocks}}


def compare(ours: object, theirs: object, path: str) -> Iterator[tuple[str, bool]]:
    """(path, whether both are the same) for every leaf of the script's output."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        yield f"{path}: fields {list(ours)} and {list(theirs)}", list(ours) == list(theirs)
        for name, value in theirs.items():
            yield from compare(ours[name], value, f"{path}.{name}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        yield f"{path}: {len(ours)} and {len(theirs)} elements", len(ours) == len(theirs)
        for index, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
            yield from compare(mine, their, f"{path}[{index}]")
    else:
        yield f"{path}: {ours!r} and {theirs!r}", is_same(ours, theirs)


def is_same(ours: object, theirs: object) -> bool:
    """One leaf. The script prints integers as hex, what it has no type for as bytes."""
    if isinstance(theirs, bool):
        return bool(ours) is theirs
    if not isinstance(theirs, str):
        return False
    if theirs == "nullptr":
        return ours is None
    if match := _INTEGER.fullmatch(theirs):
        unsigned, negative = int(match[1], 16), match[2]
        return ours == (int(negative) if negative else unsigned)
    data = bytes.fromhex(theirs)
    if isinstance(ours, str):
        return bytes.fromhex(ours) == data
    if ours is None:  # a timer that is off, or a null pointer
        return data in (b"\xff" * 8, b"0")
    if isinstance(ours, dict | list):  # a helper struct or a list, which the script leaves whole
        return can_be(data, list(flat(ours)))
    assert isinstance(ours, int)
    words = ours.to_bytes(len(data), "little", signed=ours < 0)
    swapped = b"".join(words[at : at + 8][::-1] for at in range(0, len(words), 8))
    return data == swapped


def flat(ours: object) -> Iterator[object]:
    """The integers in a helper struct, or in a list with a 1 before each element and a 0 behind."""
    if isinstance(ours, dict):
        for value in ours.values():
            yield from flat(value)
    elif isinstance(ours, list):
        for value in ours:
            yield 1
            yield from flat(value)
        yield 0
    else:
        yield ours


def can_be(data: bytes, values: list[object]) -> bool:
    """``data`` is these integers one after the other, big-endian, each of some usual width."""
    if not values:
        return not data
    return any(
        len(data) >= width
        and values[0] in (int.from_bytes(data[:width], "big"), _signed(data[:width]))
        and can_be(data[width:], values[1:])
        for width in _WIDTHS
    )


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)
