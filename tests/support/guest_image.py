"""The small guest that checks all its memory itself, assembled for a layout at test time.

``guest/checker.S`` says what it does. The host's assembler and linker are enough; no C library.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.need import need

_SOURCE = Path(__file__).parent / "guest" / "checker.S"
_MIB = 1 << 20
_LOAD_ADDRESS = 1 * _MIB
_FIRST = 4 * _MIB  # above the guest itself
_LOW_RAM_END = 3 << 30  # of the pc machine; without paging nothing above 4 GiB is reached
_FIRMWARE = 2 * _MIB  # its tables, at the end of low RAM
_FIRMWARE_SCRATCH = 32 * _MIB  # what it used there while it booted, where there is room


@dataclass(frozen=True, slots=True)
class GuestLayout:
    """Where the guest's pages lie, bytes.

    :ivar stride: from one page to the next; more than 4096 leaves the pages between zero.
    :ivar step: from one checked word of a page to the next.
    :ivar is_timed: it also reports how long each first touch took.
    """

    ram_bytes: int
    stride: int = 4096
    step: int = 64
    is_timed: bool = False

    @property
    def first(self) -> int:
        return _FIRST

    @property
    def last(self) -> int:
        """Behind the last page."""
        end = min(self.ram_bytes, _LOW_RAM_END)
        return end - (_FIRMWARE if self.stride == 4096 else _FIRMWARE_SCRATCH)

    @property
    def page_count(self) -> int:
        """How many pages it writes and checks."""
        return -(-(self.last - self.first) // self.stride)


def layout_for(ram_bytes: int, *, is_timed: bool = False) -> GuestLayout:
    """Small RAM is used densely, large RAM sparsely: what a guest touches the host must populate,
    2 MiB at a time where it has transparent huge pages."""
    stride = 4096
    if ram_bytes // stride > 16384:
        stride = ram_bytes // 1024
    return GuestLayout(ram_bytes, stride, is_timed=is_timed)


def guest_image(layout: GuestLayout) -> Path:
    """The guest as an ELF file for QEMU's ``-kernel``; assembled once per layout and source."""
    for tool in ("as", "ld"):
        need(shutil.which(tool), f"no {tool} on this host", remedy="apt-get install binutils")
    symbols = {
        "FIRST": layout.first,
        "LAST": layout.last,
        "STRIDE": layout.stride,
        "STEP": layout.step,
        "TIMED": int(layout.is_timed),
    }
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(symbols).encode()).hexdigest()[:16]
    target = _folder() / f"guest-{key}.elf"
    if not target.exists():
        _assemble(symbols, target)
    return target


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"postcopy-guests-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _assemble(symbols: dict[str, int], target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="guest-") as work:
        objects, image = Path(work) / "guest.o", Path(work) / "guest.elf"
        defines = [word for name, value in symbols.items() for word in _define(name, value)]
        _tool("as", "--32", *defines, "-o", str(objects), str(_SOURCE))
        place = f"{_LOAD_ADDRESS:#x}"
        _tool("ld", "-m", "elf_i386", "-N", "-Ttext", place, "-o", str(image), str(objects))
        # Another run may be doing the same: whole or not at all.
        partial = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(image, partial)
        os.replace(partial, target)


def _define(name: str, value: int) -> tuple[str, str]:
    return "--defsym", f"{name}={value:#x}"


def _tool(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
