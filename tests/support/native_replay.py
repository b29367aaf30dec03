"""A stream recorded between two of our own machines, and played to a fresh one, damaged or not.

The player is a socket that says its bytes and closes: what the destination answers is read and
thrown away. A stream of our own kind can be played too, since the source's part of the handshake
does not depend on the answers.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guestmem import TARGET_PAGE_BYTES
from tests.support.pair import Side, pair, side
from tests.support.proxy import Proxy
from tests.support.stream_elements import Element, Phase
from tests.support.tamper import Tamper

TIMEOUT_S = 60.0
BARE: dict[str, Any] = {
    "machine_type": "none",
    "smp": 0,
    "fill_share": 0.0,
    "ram_bytes": 9 * TARGET_PAGE_BYTES,
    "extra_blocks": (("second", 3 * TARGET_PAGE_BYTES),),
}
TOY: dict[str, Any] = {"ram_bytes": 72 * TARGET_PAGE_BYTES, "smp": 1, "rate": 1000}


@dataclass(frozen=True)
class Recording:
    """A whole main stream, and what is in it.

    :ivar options: of the machine that takes it.
    :ivar framed_from: offset on the wire of the first frame; ``None``: no checksums.
    :ivar borders: offsets on the wire where something begins.
    :ivar ram: per block what the guest's memory was when it left.
    """

    options: dict[str, Any]
    postcopy: bool
    wire: bytes
    framed_from: int | None
    borders: tuple[int, ...]
    ram: dict[str, bytes]


class _Recorder(Tamper):
    """Keeps every element of the forward direction."""

    def __init__(self) -> None:
        super().__init__(lambda _: False)
        self.elements: list[Element] = []

    def see(self, element: Element) -> list[Element]:
        if element.phase is not Phase.RETURN:
            self.elements.append(element)
        return [element]


def record(*, postcopy: bool, checksum: bool, toy: bool = False) -> Recording:
    """Migrate once and keep the bytes.

    :param toy: a machine with devices and a running vCPU instead of bare RAM.
    """
    options = TOY if toy else BARE
    recorder, folder = _Recorder(), Path(tempfile.mkdtemp(prefix="replay-"))
    try:
        with pair(postcopy=postcopy, **options) as (source, target):
            if not toy:
                _fill(source)
            for each in (source, target):
                each.service.set_parameters({"x-checksum": checksum, "x-split-run": checksum})
            target.service.migrate_incoming(f"unix:{folder}/in")
            source.machine.start()
            with Proxy(f"unix:{folder}/in", recorder) as proxy:
                source.service.migrate(proxy.uri)
                if postcopy:
                    source.service.start_postcopy()
                assert source.service.wait(TIMEOUT_S) == "completed", source.service.query()
                assert target.service.wait(TIMEOUT_S) == "completed", target.service.query()
            ram = _contents(source)
    finally:
        shutil.rmtree(folder)
    return _recording(options, postcopy, recorder.elements, ram)


def _recording(
    options: dict[str, Any], postcopy: bool, elements: list[Element], ram: dict[str, bytes]
) -> Recording:
    wire, borders, framed_from = bytearray(), [], None
    for element in elements:
        borders.append(len(wire))
        if element.frames and framed_from is None:
            framed_from = len(wire) + element.frames[0][0]
        wire += element.wire()
    return Recording(options, postcopy, bytes(wire), framed_from, tuple(borders), ram)


def _fill(one: Side) -> None:
    """Pages that differ, every third of them zero."""
    for block in one.machine.ram:
        for page in range(block.page_count):
            if page % 3:
                data = bytes([page, len(block.idstr)]) * (TARGET_PAGE_BYTES // 2)
                block.write(page * TARGET_PAGE_BYTES, data)


def _contents(one: Side) -> dict[str, bytes]:
    return {block.idstr: block.read(0, block.used_length) for block in one.machine.ram}


@dataclass(frozen=True)
class Outcome:
    """How a destination took a stream.

    :ivar pages: per block the target pages that came, by number, as they are in memory. Empty for a
        machine whose guest wrote meanwhile.
    """

    status: str
    error: str
    statuses: list[object]
    pages: dict[str, dict[int, bytes]]


def play(recording: Recording, wire: bytes) -> Outcome:
    """A fresh machine is given ``wire``, and then the end."""
    folder = Path(tempfile.mkdtemp(prefix="replay-"))
    try:
        with side(**recording.options, incoming=True) as target:
            target.service.set_capabilities({"postcopy-ram": recording.postcopy})
            target.service.migrate_incoming(f"unix:{folder}/in")
            with _player(f"{folder}/in", wire):
                status = target.service.wait(TIMEOUT_S)
            info = target.service.query()
            pages = {} if recording.options is TOY else _received(target)
            return Outcome(status, str(info.get("error-desc", "")), target.statuses, pages)
    finally:
        shutil.rmtree(folder)


def _received(target: Side) -> dict[str, dict[int, bytes]]:
    """Read only what is marked as come: the rest would make us wait for it."""
    incoming = target.service.incoming.migration
    if incoming is None:
        return {}
    found = {}
    for block in target.machine.ram:
        bits = incoming.ram.received[block.idstr]
        found[block.idstr] = {
            page: block.read(page * TARGET_PAGE_BYTES, TARGET_PAGE_BYTES)
            for page in range(block.page_count)
            if bits.test(page)
        }
    return found


@contextlib.contextmanager
def _player(path: str, wire: bytes) -> Iterator[None]:
    """Says ``wire`` and closes its side; reads until the other is closed too."""
    end = socket.socket(socket.AF_UNIX)
    end.connect(path)

    def say() -> None:
        with contextlib.suppress(OSError):  # a destination that refuses does not read to the end
            end.sendall(wire)
            end.shutdown(socket.SHUT_WR)

    def hear() -> None:
        with contextlib.suppress(OSError):
            while end.recv(1 << 16):
                pass

    threads = [threading.Thread(target=each, daemon=True) for each in (say, hear)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(TIMEOUT_S)
        end.close()
