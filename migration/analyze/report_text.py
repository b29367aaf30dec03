"""The events as text for people: one line each, device fields indented below, RAM at the end.

Lines are printed as events come, so a long stream shows progress and a damaged one shows how far it
was good. Consecutive RAM sections of the iteration are summed up in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from migration.wire.constants import RAM_SECTION_IDSTR, SectionType

from .events import (
    ChannelEvent,
    CommandEvent,
    ConfigurationEvent,
    CutEvent,
    DescriptionEvent,
    EndEvent,
    ErrorEvent,
    Event,
    HeaderEvent,
    MultifdEvent,
    PreemptEvent,
    RamBlockEvent,
    ReturnPathEvent,
    SectionEvent,
)
from .pagemap import BlockState
from .ramdraw import LEGEND, draw, pages_per_cell

_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_LIST_SHOWN = 8
_HEX_SHOWN = 48
_RANGES_SHOWN = 4
_TEXT_MIN = 3
_CELL_STYLES = {"#": "green", "0": "blue", "2": "yellow", "x": "red", ".": "dim"}


class TextReport:
    """Prints events.

    :param console: where to.
    :param is_long: show device fields of any length in full.
    :param with_map: draw the RAM blocks.
    """

    def __init__(self, console: Console, *, is_long: bool = False, with_map: bool = False) -> None:
        self._console = console
        self._is_long = is_long
        self._with_map = with_map
        self._parts: list[SectionEvent] = []
        self._blocks: list[BlockState] = []

    def show(self, event: Event) -> None:
        """Print one event (or keep it until the run of RAM sections it belongs to is over)."""
        if isinstance(event, RamBlockEvent):
            self._blocks.append(event.block)
            return
        if isinstance(event, SectionEvent) and _is_iteration(event):
            self._parts.append(event)
            return
        self._flush_parts()
        if isinstance(event, EndEvent | ErrorEvent):
            self._ram_blocks()
        self._one(event)

    def _one(self, event: Event) -> None:
        match event:
            case ChannelEvent(file, role):
                self._console.print(Text.assemble("\n", (file, "bold"), f"  {role} channel"))
            case HeaderEvent(version, offset):
                self._line(offset, 8, "header", f"QEMU migration stream, version {version}")
            case ConfigurationEvent():
                self._configuration(event)
            case SectionEvent():
                self._section(event)
            case CommandEvent(offset, length, name, values, in_package):
                self._line(offset, length, "command", _words(name, values), inside=in_package)
            case DescriptionEvent(offset, length, _, count):
                self._line(offset, length, "description", f"{count} device sections described")
            case ReturnPathEvent(offset, length, name, values):
                self._line(offset, length, "message", _words(name, values))
            case MultifdEvent(file, channel, values):
                self._console.print(
                    Text.assemble("\n", (file, "bold"), _words(f"  multifd {channel}:", values))
                )
            case PreemptEvent(_, values):
                self._console.print(Text(_words("            preempt:", values)))
            case CutEvent(offset, section, message):
                where = f"in section {section}: " if section else ""
                self._line(offset, 0, "cut", f"{where}{message}", style="yellow")
            case EndEvent(offset, trailing):
                rest = f"; {trailing} bytes after it belong to nobody" if trailing else ""
                style = "yellow" if trailing else "green"
                self._line(offset, 0, "end", f"the stream is complete{rest}", style=style)
            case ErrorEvent():
                self._error(event)

    def _line(
        self,
        offset: int,
        length: int,
        kind: str,
        text: str,
        *,
        style: str = "cyan",
        inside: bool = False,
    ) -> None:
        size = f"{length:>10}" if length else " " * 10
        margin = "  " if inside else ""
        head = f"{offset:#012x} {size}  {margin}"
        self._console.print(Text.assemble((head, "dim"), (f"{kind:<12}", style), text))

    def _configuration(self, event: ConfigurationEvent) -> None:
        config = event.configuration
        words = [f"machine {config.machine}"]
        if config.target_page_bits is not None:
            words.append(f"target pages of 2^{config.target_page_bits}")
        if config.capabilities is not None:
            words.append(f"capabilities {', '.join(config.capabilities) or 'none'}")
        if config.uuid is not None:
            words.append(f"uuid {config.uuid}")
        self._line(event.offset, event.length, "config", ", ".join(words))

    def _section(self, event: SectionEvent) -> None:
        header = event.header
        text = f"{header.idstr}"
        if header.instance_id or header.type is SectionType.FULL:
            text += f" #{header.instance_id}"
        if header.type in (SectionType.START, SectionType.FULL):
            text += f" version {header.version_id}"
        if not event.has_footer:
            text += ", no footer"
        if event.live is not None and header.idstr == RAM_SECTION_IDSTR:
            text += f": {_ram_words(event.live)}"
        kind = header.type.name.lower()
        self._line(event.offset, event.length, kind, text, inside=event.in_package)
        if event.device is not None:
            self._fields(event.device, 1)
        elif event.live is not None and header.idstr != RAM_SECTION_IDSTR:
            self._fields(event.live, 1)

    def _fields(self, fields: Mapping[str, object], depth: int) -> None:
        shown = {name: value for name, value in fields.items() if not name.startswith("unused")}
        width = min(max((len(name) for name in shown), default=0), 32)
        margin = " " * 24 + "  " * depth
        for name, value in shown.items():
            if isinstance(value, dict):
                self._console.print(Text(f"{margin}{name}"))
                self._fields(value, depth + 1)
            elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
                self._elements(name, value, depth)
            else:
                text = Text.assemble(f"{margin}{name:<{width}}  ", (self._value(value), "bold"))
                self._console.print(text)

    def _elements(self, name: str, elements: list[object], depth: int) -> None:
        """An array of structs; elements like the one in front of them are only counted."""
        margin = " " * 24 + "  " * depth
        start = 0
        for each, group in groupby(elements):
            count = len(list(group))
            label = f"{name}[{start}]" + (f" to [{start + count - 1}], all:" if count > 1 else "")
            self._console.print(Text(f"{margin}{label}"))
            self._fields(each if isinstance(each, dict) else {"value": each}, depth + 1)
            start += count

    def _value(self, value: object) -> str:
        if value is None:
            return "off"
        if isinstance(value, str) and (text := _text_in(value)):
            return repr(text)
        if isinstance(value, str) and len(value) > _HEX_SHOWN and not self._is_long:
            return f"{value[:_HEX_SHOWN]}… ({len(value) // 2} bytes)"
        if isinstance(value, list):
            shown = value if self._is_long else value[:_LIST_SHOWN]
            more = f" … ({len(value)})" if len(shown) < len(value) else ""
            return " ".join(str(each) for each in shown) + more
        return str(value)

    def _flush_parts(self) -> None:
        parts, self._parts = self._parts, []
        if len(parts) < 3:
            for event in parts:
                self._section(event)
            return
        totals: dict[str, int] = {}
        for event in parts:
            for name, value in (event.live or {}).items():
                if isinstance(value, int):
                    totals[name] = totals.get(name, 0) + value
        length = sum(event.length for event in parts)
        text = f"ram × {len(parts)}: {_ram_words(totals)}"
        self._line(parts[0].offset, length, "part", text)

    def _ram_blocks(self) -> None:
        if not self._blocks:
            return
        table = Table(
            "RAM block", title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0)
        )
        for column in ("length", "host page", "normal", "zero", "resent", "other"):
            table.add_column(column, justify="right" if column != "other" else "left")
        for block in self._blocks:
            counts = block.counts
            names = ("xbzrle", "compressed", "multifd", "discarded")
            others = [f"{getattr(counts, name)} {name}" for name in names if getattr(counts, name)]
            table.add_row(
                Text(block.idstr),
                size_text(block.used_length),
                size_text(block.page_size),
                str(counts.normal),
                str(counts.zero),
                "?" if block.states is None else str(counts.resent),
                ", ".join(others),
            )
        self._console.print()
        self._console.print(table)
        if self._with_map:
            for block in self._blocks:
                self._draw(block)
        self._console.print()

    def _draw(self, block: BlockState) -> None:
        per_cell = size_text(pages_per_cell(block) * block.target_page_bytes)
        title = f"  one cell = {per_cell}" if block.states is not None else "  too large to map"
        self._console.print(Text.assemble("\n", (block.idstr, "bold"), title))
        for offset, cells in draw(block):
            parts = [(cell, _CELL_STYLES[cell]) for cell in cells]
            self._console.print(Text.assemble((f"{offset:#012x}  ", "dim"), *parts))
        self._console.print(Text(LEGEND, style="dim"))

    def _error(self, event: ErrorEvent) -> None:
        where = f"section {event.section}: " if event.section else ""
        self._line(event.offset, 0, "broken", f"{where}{event.message}", style="bold red")
        if event.last_good:
            good = event.last_good
            last = f"{good['name']} ({good['type']}) at {good['offset']:#x}"
            self._console.print(Text(f"{'':<25}last good: {last}"))


def _text_in(value: str) -> str | None:
    """The text in a NUL-padded buffer given as hex, e.g. a run state; None when it holds none."""
    try:
        text = bytes.fromhex(value).rstrip(b"\0").decode("ascii")
    except ValueError:
        return None
    return text if len(text) >= _TEXT_MIN and text.isprintable() else None


def size_text(length: int) -> str:
    """A length for people: ``8.2 MiB``, exact when it is a whole number of its unit."""
    for unit, name in _UNITS:
        if length >= unit:
            return (
                f"{length // unit} {name}" if length % unit == 0 else f"{length / unit:.1f} {name}"
            )
    return f"{length} B"


def _is_iteration(event: SectionEvent) -> bool:
    return event.header.type is SectionType.PART and event.header.idstr == RAM_SECTION_IDSTR


def _ram_words(live: Mapping[str, object]) -> str:
    blocks = live.get("blocks")
    if isinstance(blocks, list):
        total = live["total"]
        assert isinstance(total, int)
        return f"{size_text(total)} in {len(blocks)} block{'s' if len(blocks) != 1 else ''}"
    return ", ".join(f"{value} {name}" for name, value in live.items() if value) or "nothing"


def _words(name: str, values: Mapping[str, object]) -> str:
    words = [name]
    for key, value in values.items():
        if key == "ranges" and isinstance(value, list):
            shown = [f"{start:#x}+{length:#x}" for start, length in value[:_RANGES_SHOWN]]
            more = f" … ({len(value)} ranges)" if len(value) > _RANGES_SHOWN else ""
            words.append(" ".join(shown) + more)
        elif key in ("start", "value") and isinstance(value, int):
            words.append(f"{value:#x}" if value > 9 else str(value))
        elif isinstance(value, dict):
            words.append(f"{key} " + ", ".join(f"{each} {what}" for what, each in value.items()))
        elif isinstance(value, list):
            words.append(f"{key} {', '.join(str(each) for each in value) or 'none'}")
        else:
            words.append(f"{key} {value}")
    return " ".join(words)
