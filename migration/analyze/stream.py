"""One main channel, taken apart front to back.

The loop is a reader's loop: type byte, then whatever it announces. Only device sections need more:
where they end is found by looking ahead (``cut``), what is in them is known when the description
comes (``held``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from migration.wire.commands import (
    Packaged,
    Ping,
    PostcopyAdvise,
    RamDiscard,
    RamZero,
    read_command,
)
from migration.wire.constants import (
    RAM_SECTION_IDSTR,
    RAM_SECTION_VERSION,
    SECTION_FOOTER,
    RamFlag,
    SectionType,
)
from migration.wire.errors import RemoteStreamError
from migration.wire.extension import CHOSEN, FEATURE_MASK, OFFER, Feature
from migration.wire.headers import (
    SectionHeader,
    check_footer,
    read_configuration,
    read_file_header,
    read_section_header,
    read_section_type,
    read_vmdescription,
)
from migration.wire.ram_setup import RamSetup, RamSetupBlock, read_ram_setup

from .cut import cut_by_description, find_description, read_to_footer
from .description import parse_description
from .events import (
    CommandEvent,
    ConfigurationEvent,
    DescriptionEvent,
    EndEvent,
    Event,
    HeaderEvent,
    SectionEvent,
)
from .held import HeldEvents
from .live import LIVE_READERS
from .mapped import read_block_area
from .messages import command_fields
from .pagemap import BlockState
from .ram import RamChannel, iter_ram_records
from .source import Source
from .state import MigrationState

_SECTIONS = (SectionType.START, SectionType.PART, SectionType.END, SectionType.FULL)


class MainStream:
    """A main channel.

    :param source: at the file header, or (``is_resumed``) at the first byte of a channel that
        postcopy recovery opened, which has no header.
    :param state: what earlier channels of this migration left; changed as the stream goes on.
    """

    def __init__(self, source: Source, state: MigrationState, *, is_resumed: bool = False) -> None:
        self._source = source
        self._state = state
        self._is_resumed = is_resumed
        self._channel = RamChannel(state.ram.map)
        self._held = HeldEvents(state.held_bytes_max)
        self._offered = False

    def run(self) -> Iterator[Event]:
        """Everything in the stream, in order.

        :raises RemoteStreamError: the stream breaks; everything before was given out.
        """
        try:
            if not self._is_resumed:
                yield from self._preamble()
            yield from self._body()
            yield from self._trailer()
        except RemoteStreamError:
            yield from self._held.release(None)
            raise

    def _preamble(self) -> Iterator[Event]:
        source, start = self._source, self._source.position
        self._enter("header")
        header = read_file_header(source)
        yield HeaderEvent(header.version, start)
        self._done("header", "header", start)
        if source.peek(1) != bytes([SectionType.CONFIGURATION]):
            return
        start, mark = source.position, source.consumed
        self._enter("configuration")
        read_section_type(source)
        configuration = read_configuration(source)
        self._state.configuration = configuration
        if configuration.target_page_bits is not None:
            bits = min(configuration.target_page_bits, 64)
            self._state.set_target_page_bytes(1 << bits, start)
        yield ConfigurationEvent(start, source.consumed - mark, configuration)
        self._done("configuration", "configuration", start)

    def _body(self) -> Iterator[Event]:
        """Sections and commands up to and with the EOF byte."""
        while True:
            kind, start, mark = self._next()
            if kind is SectionType.EOF:
                return
            if kind is SectionType.COMMAND:
                yield from self._command(start, mark)
            elif kind is SectionType.FULL and self._state.has_footers is False:
                yield from self._sections_without_footers(start)
            elif kind in _SECTIONS:
                yield from self._section(kind, start, mark)
            else:
                raise RemoteStreamError(f"{kind.name} between sections", offset=start)

    def _trailer(self) -> Iterator[Event]:
        source = self._source
        if source.peek(1) == bytes([SectionType.VMDESCRIPTION]):
            start, mark = source.position, source.consumed
            self._enter("vmdescription")
            read_section_type(source)
            text = read_vmdescription(source)
            description = parse_description(text, start + 5)
            count = len(description.devices)
            yield from self._held.release(description)
            length = source.consumed - mark
            yield DescriptionEvent(start, length, description.page_size, count, text)
            self._done("vmdescription", "vmdescription", start)
        yield from self._held.release(None)
        end = source.position
        yield EndEvent(end, source.drain())

    def _next(self) -> tuple[SectionType, int, int]:
        self._enter(None)
        start, mark = self._source.position, self._source.consumed
        last = self._state.last_good
        after = str(last["name"]) if last else None
        return read_section_type(self._source, after=after), start, mark

    def _section(self, kind: SectionType, start: int, mark: int) -> Iterator[Event]:
        source, state = self._source, self._state
        header = read_section_header(source, kind, state.started)
        self._enter(header.idstr)
        event = SectionEvent(header, start, 0, in_package=self._in_package)
        if kind is SectionType.FULL:
            event.payload_offset = source.position
            event.payload = read_to_footer(source, header, state.started, state.held_bytes_max)
        elif header.idstr == RAM_SECTION_IDSTR:
            event.live = self._ram(header)
        elif header.idstr in LIVE_READERS:
            event.live = LIVE_READERS[header.idstr](source)
        else:
            if state.has_footers is False:
                raise RemoteStreamError("unknown live section without a footer", offset=start)
            data = read_to_footer(source, header, state.started, state.held_bytes_max)
            event.live = {"bytes": len(data)}
        event.has_footer = self._footer(header)
        event.length = source.consumed - mark
        yield from self._held.put(event)
        self._done(header.idstr, kind.name.lower(), start)

    def _footer(self, header: SectionHeader) -> bool:
        """Consume the footer. The first section's end tells whether this stream has them."""
        state = self._state
        if state.has_footers is None:
            following = self._source.peek(1)
            # A footer's mark is no section type, and the other way round.
            is_type = following[:1] <= bytes([SectionType.COMMAND]) and bool(following)
            state.has_footers = following == bytes([SECTION_FOOTER]) or not is_type
        if state.has_footers:
            check_footer(self._source, header)
        return state.has_footers

    def _sections_without_footers(self, start: int) -> Iterator[Event]:
        """All device sections at once: only the description behind them can tell them apart."""
        source, limit = self._source, self._state.held_bytes_max
        self._enter("devices")
        data = bytes([SectionType.FULL]) + source.peek(limit)
        found = find_description(data, start)
        if found is None:
            raise RemoteStreamError(
                "device sections without footers need a description to tell them apart, and no "
                f"fitting one ends within {limit} bytes",
                offset=start,
            )
        end, description = found
        for cut in cut_by_description(data[:end], description.devices, has_footers=False):
            event = SectionEvent(cut.header, start + cut.start, cut.end - cut.start)
            event.has_footer = False
            event.payload = cut.payload
            event.payload_offset = start + cut.payload_start
            yield from self._held.put(event)
            self._done(cut.header.idstr, "full", event.offset)
        source.skip(end - 1)

    def _ram(self, header: SectionHeader) -> dict[str, object]:
        if header.version_id != RAM_SECTION_VERSION:
            raise RemoteStreamError(
                f"ram section of version {header.version_id}", offset=self._source.position
            )
        if header.type is SectionType.START:
            return _describe_setup(self._ram_setup())
        state = self._state
        counts: Counter[RamFlag] = Counter()
        ram = state.ram
        for record in iter_ram_records(self._source, self._channel, want_data=ram.wants_data):
            ram.take(record)
            counts[record.kind] += 1
            if record.kind is RamFlag.MULTIFD_FLUSH and state.syncs_at_flush:
                state.sync_multifd()
        if not state.syncs_at_flush:
            state.sync_multifd()
        return _describe_records(counts)

    def _ram_setup(self) -> RamSetup:
        state, source = self._state, self._source
        if any(True for _ in state.ram.map):
            raise RemoteStreamError("a second block list", offset=source.position)
        state.ram.map.start(state.target_page_bytes)
        has_mapped_ram = state.has_capability("mapped-ram")

        def skip_pages(entry: RamSetupBlock) -> None:
            read_block_area(source, entry, state.ram)

        setup = read_ram_setup(
            source,
            page_sizes_summary=state.page_sizes_summary,
            has_addresses=state.has_capability("x-ignore-shared"),
            has_mapped_ram=has_mapped_ram,
            skip_pages=skip_pages,
        )
        if not has_mapped_ram:
            for block in setup.blocks:
                state.ram.add(block)
        state.syncs_at_flush = setup.multifd_flush
        state.sync_multifd()
        return setup

    def _command(self, start: int, mark: int) -> Iterator[Event]:
        source, state = self._source, self._state
        self._enter("command")
        command = read_command(source)
        self._enter(None)
        name, values = command_fields(command)
        event = CommandEvent(start, source.consumed - mark, name, values, self._in_package)
        match command:
            case PostcopyAdvise(summary, target_page_bytes):
                state.set_target_page_bytes(target_page_bytes, start)
                state.page_sizes_summary = summary
            case RamDiscard():
                self._discard(command, start)
            case RamZero():
                self._zero(command, start)
            case Ping(value):
                self._extension(value)
        yield from self._held.put(event)
        self._done(name, "command", start)
        if isinstance(command, Packaged):
            yield from self._package(command.length, start)

    def _package(self, length: int, start: int) -> Iterator[Event]:
        if self._in_package:
            raise RemoteStreamError("a package inside a package", offset=start)
        with self._source.package(length):
            while not self._source.at_end() or self._source.remaining_in_package:
                kind, at, mark = self._next()
                if kind is SectionType.COMMAND:
                    yield from self._command(at, mark)
                elif kind in _SECTIONS:
                    yield from self._section(kind, at, mark)
                else:
                    raise RemoteStreamError(f"{kind.name} inside a package", offset=at)

    def _discard(self, command: RamDiscard, start: int) -> None:
        block = self._block_of(command, "discard", start)
        size = block.target_page_bytes
        for each in command.ranges:
            block.discard(each.start // size, each.length // size)

    def _zero(self, command: RamZero, start: int) -> None:
        block = self._block_of(command, "zero range", start)
        size = block.target_page_bytes
        for each in command.ranges:
            block.is_zero(each.start // size, each.length // size)

    def _block_of(self, command: RamDiscard | RamZero, what: str, start: int) -> BlockState:
        """The block a command names, if its ranges are whole pages inside it."""
        block = self._state.ram.map.get(command.idstr)
        if block is None:
            raise RemoteStreamError(f"{what} of unknown block {command.idstr!r}", offset=start)
        size = block.target_page_bytes
        for each in command.ranges:
            end = each.start + each.length
            if each.start % size or each.length % size or end > block.page_count * size:
                raise RemoteStreamError(
                    f"{what} of {each.start:#x}+{each.length:#x} in block {block.idstr!r} of "
                    f"{block.used_length:#x} bytes",
                    offset=start,
                )
        return block

    def _extension(self, value: int) -> None:
        """Follow our own handshake: from the byte after CHOSEN on, its features are in force."""
        family, bits = value & ~FEATURE_MASK, value & FEATURE_MASK
        if family == OFFER:
            self._offered = True
        elif family == CHOSEN and self._offered:
            self._state.features = Feature(bits)
            if bits & Feature.CHECKSUM:
                self._source.start_frames()

    @property
    def _in_package(self) -> bool:
        return self._source.remaining_in_package is not None

    def _enter(self, section: str | None) -> None:
        label = f"package/{section}" if section and self._in_package else section
        if section is None and self._in_package:
            label = "package"
        self._source.section = self._state.section = label

    def _done(self, name: str, kind: str, offset: int) -> None:
        self._state.last_good = {"name": name, "type": kind, "offset": offset}


def _describe_setup(setup: RamSetup) -> dict[str, object]:
    blocks: list[dict[str, object]] = []
    for block in setup.blocks:
        entry: dict[str, object] = {"name": block.idstr, "length": block.used_length}
        if block.page_size is not None:
            entry["page_size"] = block.page_size
        if block.gpa is not None:
            entry["gpa"] = block.gpa
        if block.mapped_ram is not None:
            entry["bitmap_offset"] = block.mapped_ram.bitmap_offset
            entry["pages_offset"] = block.mapped_ram.pages_offset
        blocks.append(entry)
    result: dict[str, object] = {"total": setup.total, "blocks": blocks}
    return result | {"multifd_flush": True} if setup.multifd_flush else result


_RECORD_NAMES = {
    RamFlag.PAGE: "normal",
    RamFlag.ZERO: "zero",
    RamFlag.XBZRLE: "xbzrle",
    RamFlag.COMPRESS_PAGE: "compressed",
    RamFlag.MULTIFD_FLUSH: "multifd_flush",
}


def _describe_records(counts: Counter[RamFlag]) -> dict[str, object]:
    result: dict[str, object] = {"normal": 0, "zero": 0}
    for kind, name in _RECORD_NAMES.items():
        if counts[kind]:
            result[name] = counts[kind]
    return result
