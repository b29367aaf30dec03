"""A multifd migration played to a fresh destination: recorded from a QEMU, made by hand, damaged.

Each connection is a socket that says its bytes and closes its side; what is answered is thrown
away.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guestmem import TARGET_PAGE_BYTES
from migration.wire.constants import MULTIFD_MAGIC, MULTIFD_PACKET_BYTES, MULTIFD_PACKET_SLOTS
from migration.wire.multifd import Greeting, encode_greeting
from tests.support.pair import side

TIMEOUT_S = 60.0
_HEAD = struct.Struct(">IIIIIIQI28x256s")


@dataclass(frozen=True)
class Outcome:
    """How it ended; ``ram`` of a guest that came, else empty."""

    status: str
    error: str
    ram: bytes


def packet(
    normal: Sequence[int] = (),
    zero: Sequence[int] = (),
    *,
    idstr: bytes = b"ram",
    flags: int = 0,
    slots: int = MULTIFD_PACKET_SLOTS,
    counts: tuple[int, int] | None = None,
    size: int | None = None,
    number: int = 0,
    version: int = 1,
    data: bytes | None = None,
) -> bytes:
    """One packet and its pages, each filled with the number of its page.

    :param normal, zero: offsets, bytes. The rest is what a well-behaved source would say of them.
    """
    counted = (len(normal), len(zero)) if counts is None else counts
    length = counted[0] * TARGET_PAGE_BYTES % 2**32 if size is None else size
    head = _HEAD.pack(
        MULTIFD_MAGIC, version, flags, slots, counted[0], length, number, counted[1], idstr
    )
    offsets = struct.pack(f">{len(normal) + len(zero)}Q", *normal, *zero)
    if data is None:
        data = b"".join(page_of(offset) for offset in normal)
    return (head + offsets).ljust(MULTIFD_PACKET_BYTES, b"\0") + data


def page_of(offset: int) -> bytes:
    """What :func:`packet` puts into the page there."""
    return bytes([offset // TARGET_PAGE_BYTES % 255 + 1]) * TARGET_PAGE_BYTES


def sync(*, slots: int = 0) -> bytes:
    """A packet that is a SYNC and nothing else."""
    return packet(flags=1, slots=slots, idstr=b"")


def greeting(channel: int) -> bytes:
    """The first 64 bytes of a channel."""
    return encode_greeting(Greeting(channel))


def play(
    connections: Sequence[bytes], *, ram_bytes: int, channels: int = 2, postcopy: bool = False
) -> Outcome:
    """A fresh machine is given all connections, in this order, and then their ends."""
    folder = Path(tempfile.mkdtemp(prefix="replay-"))
    options = {"machine_type": "none", "smp": 0, "fill_share": 0.0, "ram_bytes": ram_bytes}
    try:
        with side(**options, incoming=True) as target:
            target.service.set_capabilities({"postcopy-ram": postcopy, "multifd": True})
            target.service.set_parameters({"multifd-channels": channels})
            target.service.migrate_incoming(f"unix:{folder}/in")
            with _Players(f"{folder}/in", connections):
                status = target.service.wait(TIMEOUT_S)
            error = str(target.service.query().get("error-desc", ""))
            block = target.machine.ram.by_idstr("ram")
            ram = block.read(0, block.used_length) if status == "completed" else b""
            return Outcome(status, error, ram)
    finally:
        shutil.rmtree(folder)


class _Players:
    def __init__(self, path: str, connections: Sequence[bytes]) -> None:
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        for wire in connections:
            end = socket.socket(socket.AF_UNIX)
            end.connect(path)
            self._ends.append(end)
            for target, arguments in ((self._say, (end, wire)), (self._hear, (end,))):
                thread = threading.Thread(target=target, args=arguments, daemon=True)
                self._threads.append(thread)

    @staticmethod
    def _say(end: socket.socket, wire: bytes) -> None:
        with contextlib.suppress(OSError):  # a destination that refuses does not read to the end
            end.sendall(wire)
            end.shutdown(socket.SHUT_WR)

    @staticmethod
    def _hear(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while end.recv(1 << 16):
                pass

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        for end in self._ends:
            end.close()
