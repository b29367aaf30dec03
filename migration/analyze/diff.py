"""Two migrations compared: configuration, device fields, RAM content.

Each side is read in one pass; RAM goes to sparse temporary files (``TMPDIR``), so the room needed
is disk, at most the guest's populated RAM per side.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TypeVar

from .events import ConfigurationEvent, ErrorEvent, Event, SectionEvent
from .image import BlockImage, compare_images
from .pagemap import BlockState

RANGES_SHOWN_MAX = 64
Line = dict[str, object]
K = TypeVar("K")


class Snapshot:
    """What one side brought, filled in by feeding it the session's events."""

    def __init__(self, stack: ExitStack) -> None:
        self.configuration: Line = {}
        self.devices: dict[tuple[str, int], SectionEvent] = {}
        self.blocks: dict[str, BlockState] = {}
        self.images: dict[str, BlockImage] = {}
        self.error: ErrorEvent | None = None
        self._stack = stack

    def image_for(self, block: BlockState) -> BlockImage:
        """A temporary file for a block's content; gone when the stack closes."""
        with tempfile.TemporaryFile(prefix="postcopy-diff-") as file:
            image = self._stack.enter_context(BlockImage(os.dup(file.fileno())))
        self.blocks[block.idstr] = block
        self.images[block.idstr] = image
        return image

    def feed(self, event: Event) -> None:
        """Take over one event."""
        if isinstance(event, ConfigurationEvent):
            self.configuration = event.to_json()
        elif isinstance(event, SectionEvent) and event.device is not None:
            self.devices[event.header.idstr, event.header.instance_id] = event
        elif isinstance(event, ErrorEvent):
            self.error = event


def differences(one: Snapshot, other: Snapshot) -> Iterator[Line]:
    """A line for everything that is not the same; ``a`` is the first side, ``b`` the second."""
    for key in ("machine", "target_page_bits", "capabilities", "uuid"):
        a, b = one.configuration.get(key), other.configuration.get(key)
        if a != b:
            yield _line("configuration", key, a, b)
    for name, instance in _both(one.devices, other.devices):
        yield from _compare_device(name, instance, one.devices, other.devices)
    for idstr in _both(one.blocks, other.blocks):
        yield from _compare_block(idstr, one, other)


def flatten(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(path, plain value) for every leaf: ``timer[2].config``, ``PIIX3/rcr.rcr``."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from flatten(each, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from flatten(each, f"{path}[{index}]")
    else:
        yield path, value


def _compare_device(
    name: str,
    instance: int,
    ones: Mapping[tuple[str, int], SectionEvent],
    others: Mapping[tuple[str, int], SectionEvent],
) -> Iterator[Line]:
    one, other = ones.get((name, instance)), others.get((name, instance))
    what = f"{name}#{instance}"
    if one is None or other is None:
        yield _line("device", what, one and "present", other and "present")
        return
    if one.header.version_id != other.header.version_id:
        yield _line("device", f"{what} version", one.header.version_id, other.header.version_id)
    a, b = dict(flatten(one.device)), dict(flatten(other.device))
    for path in _both(a, b):
        if a.get(path) != b.get(path) or (path in a) != (path in b):
            yield _line("device", f"{what} {path}", a.get(path), b.get(path))


def _compare_block(idstr: str, one: Snapshot, other: Snapshot) -> Iterator[Line]:
    a, b = one.blocks.get(idstr), other.blocks.get(idstr)
    if a is None or b is None or a.used_length != b.used_length:
        yield _line("ram-block", idstr, a and a.used_length, b and b.used_length)
        return
    ranges: list[list[int]] = []
    pages = 0
    size = a.target_page_bytes
    images = one.images[idstr], other.images[idstr]
    for found in compare_images(*images, a.used_length, size):
        pages += -(-found.length // size)
        if len(ranges) < RANGES_SHOWN_MAX:
            ranges.append([found.offset, found.length])
    if pages:
        line = _line("ram", idstr, None, None)
        del line["a"], line["b"]
        yield line | {"pages": pages, "ranges": ranges}


def _both(one: Mapping[K, object], other: Mapping[K, object]) -> list[K]:
    return [*one, *(key for key in other if key not in one)]


def _line(what: str, name: str, a: object, b: object) -> Line:
    return {"kind": "difference", "what": what, "name": name, "a": a, "b": b}
