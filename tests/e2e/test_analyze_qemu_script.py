"""Our field values are those of QEMU's own analysis script, on every stream it can read.

The script is part of QEMU's source and not of this project: ``QEMU_ANALYZE_SCRIPT`` names it. It
knows files written by a plain precopy only: no commands, no configuration subsections, no
compression.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migration.analyze.events import Event, SectionEvent
from migration.analyze.session import Session
from migration.analyze.source import open_source
from migration.wire.constants import SectionType
from tests.support.analyze_vectors import Recording, content, recordings
from tests.support.need import need

VARIABLE = "QEMU_ANALYZE_SCRIPT"
READABLE = ("zero-1m", "pattern-2m", "noconfig-nofooter", "running-kvm", "devices-paused")
_INTEGER = re.compile(r"0x([0-9a-f]+)(?: \((-\d+)\))?")
_WIDTHS = (1, 2, 4, 8)


def readable() -> list[Recording]:
    """Those the script of 7.2 copes with."""
    return [
        each
        for each in recordings()
        if each.version == "7.2" and any(part in each.name for part in READABLE)
    ]


@pytest.fixture(scope="module")
def script() -> Path:
    """QEMU's script."""
    path = os.environ.get(VARIABLE)
    need(path, f"{VARIABLE} names no copy of QEMU's scripts/analyze-migration.py")
    assert path is not None
    return Path(path)


@pytest.mark.parametrize("recording", readable(), ids=lambda each: each.id)
def test_every_field_agrees(recording: Recording, script: Path, tmp_path: Path) -> None:
    """Same sections, same fields, same values; RAM blocks of the same size."""
    stream = tmp_path / "stream"
    stream.write_bytes(content(recording.to_destination[0]))
    command = [sys.executable, str(script), "-f", str(stream)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    theirs = json.loads(done.stdout)
    with open_source(str(stream)) as source:
        events = list(Session([source]).events())
    ours = dict(our_sections(events))
    assert list(ours) == list(theirs)
    compared = 0
    for name, section in theirs.items():
        for path, equal in compare(ours[name], section, name):
            compared += 1
            assert equal, path
    assert compared >= 2 * len(theirs)


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
    assert isinstance(theirs, str)
    if match := _INTEGER.fullmatch(theirs):
        unsigned, negative = int(match[1], 16), match[2]
        return ours == (int(negative) if negative else unsigned)
    data = bytes.fromhex(theirs)
    if isinstance(ours, str):
        return bytes.fromhex(ours) == data
    if ours is None:  # a timer that is off, or a null pointer
        return data in (b"\xff" * 8, b"0")
    if isinstance(ours, dict):  # a helper struct, whose fields the script does not take apart
        return can_be(data, list(ours.values()))
    assert isinstance(ours, int)
    words = ours.to_bytes(len(data), "little", signed=ours < 0)
    swapped = b"".join(words[at : at + 8][::-1] for at in range(0, len(words), 8))
    return data == swapped


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
