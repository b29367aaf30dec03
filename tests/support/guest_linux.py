"""A Linux guest: Debian's kernel and an initramfs of one program of ours (``guest/init.c``)."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.guest_image import GuestLayout
from tests.support.guest_vm import GuestOptions
from tests.support.need import need
from tests.support.qemu import MIB

_SOURCE = Path(__file__).parent / "guest" / "init.c"
RAM_BYTES = 256 * MIB
# What Linux says when something is wrong with its memory, time or devices.
COMPLAINTS = (
    "BUG",
    "Oops",
    "WARNING",
    "Kernel panic",
    "lockup",
    "stall",
    "corrupt",
    "I/O error",
    "MCE",
)


def kernel() -> Path:
    """The kernel image; the test is skipped (or fails, see ``need``) without one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "postcopy" / "linux" / "vmlinuz"
    # No remedy on purpose: `make test` has tried already, and there is none without a mirror.
    need(path.exists(), "no Linux kernel unpacked for a guest: scripts/fetch-linux gets one")
    return path


def initramfs() -> Path:
    """Built once per source."""
    need(shutil.which("gcc"), "no gcc on this host", remedy="apt-get install gcc libc6-dev")
    key = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"postcopy-guests-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"initramfs-{key}.gz"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(prefix="guest-") as work:
        program = Path(work) / "init"
        argv = ["gcc", "-O2", "-static", "-o", str(program), str(_SOURCE)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        need(done.returncode == 0, f"no static C program: {done.stderr[-200:]}")
        archive = b"".join(_archive({"init": program.read_bytes()}))
    partial = target.with_suffix(f".{os.getpid()}")
    partial.write_bytes(gzip.compress(archive, mtime=0))
    os.replace(partial, target)
    return target


def _archive(files: dict[str, bytes]) -> Iterator[bytes]:
    """cpio's "newc" form, which the kernel unpacks; see the kernel's buffer-format document."""
    entries = [("dev", 0, b""), *((name, 1, data) for name, data in files.items())]
    entries.append(("TRAILER!!!", 1, b""))
    for number, (name, is_file, data) in enumerate(entries):
        mode = (stat.S_IFREG if is_file else stat.S_IFDIR) | 0o755
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields)
        yield _padded(head + name.encode() + b"\0")
        yield _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def linux_options() -> GuestOptions:
    """A VM that boots it; the same for every QEMU it visits.

    Without cx16: QEMU 7.2's TCG gets that instruction wrong as newer kernels use it. The clock is
    the emulated one, so that no two hosts' TSCs meet.
    """
    return GuestOptions(
        GuestLayout(RAM_BYTES),
        kernel=kernel(),
        args=(
            *("-cpu", "qemu64,-cx16"),
            *("-initrd", str(initramfs())),
            *("-append", "console=ttyS0 loglevel=6 panic=-1 nokaslr"),
        ),
    )


def rounds(lines: list[str]) -> list[tuple[int, int, int]]:
    """``(round, monotonic ms, bad words)`` of each report on the console."""
    found = []
    for line in lines:
        words = line.split()
        if len(words) == 4 and words[0] == "R" and all(word.isdigit() for word in words[1:]):
            found.append((int(words[1]), int(words[2]), int(words[3])))
    return found


def complaints(lines: list[str]) -> list[str]:
    """Lines in which Linux complains."""
    return [line for line in lines if any(word in line for word in COMPLAINTS)]
