"""The recorded streams of real QEMUs, as migrations: channels grouped, RAM content known.

The small set lives in ``tests/data/vectors`` (its README says what the files are);
``POSTCOPY_VECTORS`` names a larger one of the same layout.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

VARIABLE = "POSTCOPY_VECTORS"
SMALL_SET = Path(__file__).resolve().parents[1] / "data" / "vectors"
PAGE = 4 << 10
_NAME = re.compile(r"(?P<name>.+?)(?:\.ch(?P<channel>\d+)\.(?P<way>s2d|d2s))?\.bin(?:\.xz)?")


@dataclass
class Recording:
    """One recorded migration: its files in the order the channels were opened."""

    version: str
    name: str
    to_destination: list[Path] = field(default_factory=list)
    to_source: list[Path] = field(default_factory=list)

    @property
    def id(self) -> str:
        """For pytest: ``7.2-none-zero-1m``."""
        return f"{self.version}-{self.name}"

    @property
    def is_cut(self) -> bool:
        """The first main channel ends in the middle."""
        return "-recover-" in self.name

    @property
    def has_multifd_channels(self) -> bool:
        """Pages travelled over channels of their own (not so in a mapped-ram file)."""
        return "multifd" in self.name and len(self.to_destination) > 1


def vectors_root() -> Path:
    """The larger set when there is one, else the small one."""
    return Path(os.environ.get(VARIABLE) or SMALL_SET)


def recordings() -> list[Recording]:
    """All recorded migrations."""
    found: dict[tuple[str, str], Recording] = {}
    for path in sorted(vectors_root().glob("qemu-*/*")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        version = path.parent.name.removeprefix("qemu-")
        key = (version, match["name"])
        recording = found.setdefault(key, Recording(*key))
        side = recording.to_source if match["way"] == "d2s" else recording.to_destination
        side.append(path)
    return list(found.values())


def recording(version: str, name: str) -> Recording:
    """One of them.

    :raises KeyError: not in this set.
    """
    for each in recordings():
        if (each.version, each.name) == (version, name):
            return each
    raise KeyError(f"{version}-{name}")


def content(path: Path) -> bytes:
    """The stream in a file, unpacked."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def expected_ram(name: str) -> bytes | None:
    """RAM of the ``-M none`` guest of that recording; None when it is not known."""
    match = re.match(r"none-.*-(\d)m$", name)
    if match is None:
        return None
    ram = bytearray(int(match[1]) << 20)
    if match[1] == "1" or "zero" in name:
        return bytes(ram)
    if match[1] == "4":
        _load(ram, 0x40000, _pattern(3, 640, 8))
    else:
        _load(ram, 0x40000, _pattern(1, 96, 4))
    if match[1] == "8":
        _load(ram, 0x500000, _pattern(5, 150, 5))
    return bytes(ram)


@dataclass(frozen=True)
class Sweep:
    """What the test firmware had done when it was stopped."""

    block: str
    step: int
    limit: int
    first: int
    drop: int

    def holds_for(self, ram: bytes) -> bool:
        """Byte 0 of every page it visits: ``first`` up to the drop, one less from there on."""
        values = ram[1 << 20 : self.limit : self.step]
        expected = [self.first - (index >= self.drop) for index in range(len(values))]
        return list(values) == expected


SWEEPS = {
    "pc-running-kvm-8m": Sweep("pc.ram", 0x1000, 0x300000, 5, 24),
    "microvm-running-kvm-8m": Sweep("microvm.ram", 0x1000, 0x300000, 3, 346),
    "pc-xbzrle-8m": Sweep("pc.ram", 0x1000, 0x300000, 6, 285),
    "pc-postcopy-redirtied-8m": Sweep("pc.ram", 0x1000, 0x300000, 7, 436),
    "pc-postcopy-scattered-8m": Sweep("pc.ram", 0x3000, 0x200000, 45, 28),
}


def _pattern(seed: int, pages: int, divisor: int) -> bytes:
    return b"".join(
        hashlib.sha256(b"%d/%d" % (seed, index)).digest() * 128 if index % divisor else bytes(PAGE)
        for index in range(pages)
    )


def _load(ram: bytearray, address: int, data: bytes) -> None:
    ram[address : address + len(data)] = data
