"""What the analyser finds, in stream order. ``to_json`` gives the line that ``--json`` prints.

Offsets are file offsets of the first byte (the type byte of a section); a section's ``length``
reaches from there to the end of its footer, so that ``offset + length`` is where the next thing
starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from migration.wire.headers import Configuration, SectionHeader

from .pagemap import BlockState, PageState


@dataclass(slots=True)
class ChannelEvent:
    """The next events come from this file. Only when there are several files."""

    file: str
    role: str

    def to_json(self) -> dict[str, object]:
        return {"kind": "channel", "file": self.file, "role": self.role}


@dataclass(slots=True)
class HeaderEvent:
    """The file header. ``offset`` is not 0 when a stream lies inside a larger file."""

    version: int
    offset: int = 0

    def to_json(self) -> dict[str, object]:
        line: dict[str, object] = {"kind": "header", "version": self.version}
        return line | {"offset": self.offset} if self.offset else line


@dataclass(slots=True)
class ConfigurationEvent:
    """The CONFIGURATION section."""

    offset: int
    length: int
    configuration: Configuration

    def to_json(self) -> dict[str, object]:
        config = self.configuration
        line: dict[str, object] = {
            "kind": "configuration",
            "machine": config.machine,
            "offset": self.offset,
            "length": self.length,
        }
        if config.target_page_bits is not None:
            line["target_page_bits"] = config.target_page_bits
        if config.capabilities is not None:
            line["capabilities"] = list(config.capabilities)
        if config.uuid is not None:
            line["uuid"] = str(config.uuid)
        return line


@dataclass(slots=True)
class SectionEvent:
    """A START, PART, END or FULL section.

    :ivar device: decoded fields of a FULL section; ``{"raw": hex, ...}`` where no layout is known.
    :ivar live: what a live section brought: record counts for RAM, chunks for others.
    :ivar payload: the bytes of a FULL section until they are decoded.
    """

    header: SectionHeader
    offset: int
    length: int
    in_package: bool = False
    has_footer: bool = True
    device: dict[str, object] | None = None
    live: Mapping[str, object] | None = None
    payload: bytes | None = None
    payload_offset: int = 0

    def to_json(self) -> dict[str, object]:
        header = self.header
        line: dict[str, object] = {
            "kind": "section",
            "type": header.type.name.lower(),
            "offset": self.offset,
            "length": self.length,
            "id": header.section_id,
            "name": header.idstr,
            "instance": header.instance_id,
            "version": header.version_id,
        }
        if self.in_package:
            line["package"] = True
        if not self.has_footer:
            line["footer"] = False
        if self.device is not None:
            line["device"] = self.device
        if self.live is not None:
            line["ram" if header.idstr == "ram" else "live"] = dict(self.live)
        return line


@dataclass(slots=True)
class CommandEvent:
    """A command; ``values`` are its fields."""

    offset: int
    length: int
    name: str
    values: Mapping[str, object]
    in_package: bool = False

    def to_json(self) -> dict[str, object]:
        line: dict[str, object] = {"kind": "command", "offset": self.offset, "name": self.name}
        line |= self.values
        return line | {"package": True} if self.in_package else line


@dataclass(slots=True)
class DescriptionEvent:
    """The description trailer. :ivar text: as it came, the JSON."""

    offset: int
    length: int
    page_size: int | None
    device_count: int
    text: bytes = b""

    def to_json(self) -> dict[str, object]:
        return {
            "kind": "description",
            "offset": self.offset,
            "length": self.length,
            "page_size": self.page_size,
            "devices": self.device_count,
        }


@dataclass(slots=True)
class ReturnPathEvent:
    """One message of the return path."""

    offset: int
    length: int
    name: str
    values: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        line: dict[str, object] = {"kind": "return-path", "offset": self.offset}
        return line | {"name": self.name} | dict(self.values)


@dataclass(slots=True)
class MultifdEvent:
    """Everything one multifd channel brought."""

    file: str
    channel: int
    values: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        head = {"kind": "multifd", "file": self.file, "channel": self.channel}
        return head | dict(self.values)


@dataclass(slots=True)
class PreemptEvent:
    """Everything one preempt channel brought."""

    file: str
    values: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        return {"kind": "preempt", "file": self.file} | dict(self.values)


@dataclass(slots=True)
class RamBlockEvent:
    """Sum over the whole migration for one RAM block."""

    block: BlockState
    with_map: bool = False

    def to_json(self) -> dict[str, object]:
        block, counts = self.block, self.block.counts
        pages: dict[str, object] = {
            "normal": counts.normal,
            "zero": counts.zero,
            "resent": counts.resent if block.states is not None else None,
        }
        for name in ("xbzrle", "compressed", "multifd", "discarded", "holes"):
            if value := getattr(counts, name):
                pages[name] = value
        line: dict[str, object] = {
            "kind": "ram-block",
            "name": block.idstr,
            "length": block.used_length,
            "page_size": block.page_size,
            "pages": pages,
        }
        if block.gpa is not None:
            line["gpa"] = block.gpa
        if block.mapped_ram is not None:
            line["file_offset"] = block.mapped_ram.pages_offset
        if self.with_map:
            line["map"] = [list(run) for run in _named_runs(block)]
        return line


@dataclass(slots=True)
class CutEvent:
    """The channel was cut here and the migration went on in the next file (postcopy recovery)."""

    offset: int
    section: str | None
    message: str

    def to_json(self) -> dict[str, object]:
        return {
            "kind": "cut",
            "offset": self.offset,
            "section": self.section,
            "message": self.message,
        }


@dataclass(slots=True)
class EndEvent:
    """The stream is complete. ``trailing`` bytes after it belong to nobody."""

    offset: int
    trailing: int = 0
    frames: bool = False

    def to_json(self) -> dict[str, object]:
        line: dict[str, object] = {"kind": "end", "offset": self.offset}
        return line | {"trailing": self.trailing} if self.trailing else line


@dataclass(slots=True)
class ErrorEvent:
    """The stream breaks here; nothing follows.

    :ivar last_good: the last section or command that was read whole.
    """

    offset: int
    section: str | None
    message: str
    last_good: Mapping[str, object] | None = field(default=None)

    def to_json(self) -> dict[str, object]:
        line: dict[str, object] = {
            "kind": "error",
            "offset": self.offset,
            "section": self.section,
            "message": self.message,
        }
        return line | {"last_good": dict(self.last_good)} if self.last_good else line


Event = (
    ChannelEvent
    | HeaderEvent
    | ConfigurationEvent
    | SectionEvent
    | CommandEvent
    | DescriptionEvent
    | ReturnPathEvent
    | MultifdEvent
    | PreemptEvent
    | RamBlockEvent
    | CutEvent
    | EndEvent
    | ErrorEvent
)


def state_name(state: PageState) -> str:
    """``absent``, ``zero``, ``normal``, with ``-resent`` or ``-discarded`` behind."""
    if state & PageState.DATA:
        name = "normal"
    elif state & PageState.ZERO:
        name = "zero"
    else:
        return "absent"
    if state & PageState.DISCARDED:
        return f"{name}-discarded"
    return f"{name}-resent" if state & PageState.RESENT else name


def _named_runs(block: BlockState) -> list[tuple[int, int, str]]:
    size = block.target_page_bytes
    return [(first * size, count * size, state_name(state)) for first, count, state in block.runs()]
