"""All state of one machine, in the order it goes onto the wire: devices, old-style functions, live
handlers.

One registry per machine; it is filled while the machine is built and then used only by the
migration thread (source) or the threads that read the stream (destination), one at a time. Nothing
here locks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .constants import SectionType
from .errors import LocalStreamError, RemoteStreamError
from .headers import SectionHeader, check_footer, write_footer, write_section_header
from .io import Reader, Writer
from .vmdesc import describe_stream
from .vmstate import JsonText, LiveStateHandler, PendingEstimate, VMStateDescription
from .vmstate.sections import Alias, Entry, Load, Save, check_version, load_full, save_full

__all__ = ["Entry", "SavedSections", "StateRegistry"]


@dataclass(frozen=True, slots=True)
class SavedSections:
    """What :meth:`StateRegistry.save_full_sections` wrote.

    :ivar next_section_id: first id not used.
    :ivar devices: description of each section as JSON text, in stream order; empty when not asked
        for.
    """

    next_section_id: int
    devices: tuple[str, ...]

    def vmdesc_json(self, *, page_size: int, configuration: str | None = None) -> bytes:
        """The description trailer; see :func:`migration.wire.vmdesc.describe_stream`."""
        return describe_stream(self.devices, page_size=page_size, configuration=configuration)


class StateRegistry:
    """Keeps the entries, writes and reads their sections."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._next_section_id = 0
        self._live: list[Entry] = []
        self._saved: SavedSections | None = None

    def __iter__(self) -> Iterator[Entry]:
        """Entries in wire order: priority high to low, equal ones as registered."""
        return iter(sorted(self._entries, key=lambda entry: -entry.priority))

    def __len__(self) -> int:
        return len(self._entries)

    def register(
        self,
        vmsd: VMStateDescription,
        obj: Any,
        instance_id: int | None = None,
        aliases: Iterable[Alias] = (),
        *,
        path: str | None = None,
        alias_id: int | None = None,
    ) -> Entry:
        """Register a device.

        :param instance_id: tells apart devices of one name; None: the next free one.
        :param aliases: (name, instance) pairs older sources may use for it.
        :param path: bus path such as ``0000:00:01.0``. The section is then named ``<path>/<name>``
            and the bare name, counted on its own, becomes an alias.
        :param alias_id: another instance number under which older sources sent the same name.
        :raises ValueError: that name and instance is taken, or the name is too long.
        """
        idstr = f"{path}/{vmsd.name}" if path else vmsd.name
        known = list(aliases)
        if path:
            known.append((vmsd.name, self._next_instance(vmsd.name)))
        if alias_id is not None:
            known.append((vmsd.name, alias_id))
        entry = Entry(
            idstr=idstr,
            instance_id=self._next_instance(idstr) if instance_id is None else instance_id,
            version_id=vmsd.version_id,
            minimum_version_id=vmsd.minimum_version_id,
            section_id=self._next_section_id,
            priority=vmsd.priority,
            aliases=tuple(known),
            vmsd=vmsd,
            obj=obj,
        )
        return self._add(entry)

    def register_legacy(
        self,
        idstr: str,
        instance_id: int | None,
        version_id: int,
        *,
        save: Save,
        load: Load,
        minimum_version_id: int = 0,
    ) -> Entry:
        """Register a pair of functions that write and read a payload of a format of their own.

        ``load(reader, version_id)`` must read exactly what ``save(writer)`` wrote: nothing but the
        footer behind it says where it ends.
        """
        entry = Entry(
            idstr=idstr,
            instance_id=self._next_instance(idstr) if instance_id is None else instance_id,
            version_id=version_id,
            minimum_version_id=minimum_version_id,
            section_id=self._next_section_id,
            save=save,
            load=load,
        )
        return self._add(entry)

    def register_live(self, handler: LiveStateHandler) -> Entry:
        """Register a handler of state that is sent in rounds; its sections are START, PART and
        END.
        """
        entry = Entry(
            idstr=handler.idstr,
            instance_id=handler.instance_id,
            version_id=handler.version_id,
            minimum_version_id=handler.minimum_version_id,
            section_id=self._next_section_id,
            handler=handler,
        )
        return self._add(entry)

    def unregister(self, entry: Entry) -> None:
        """Take an entry out (a device was unplugged). The others keep their section ids."""
        self._entries.remove(entry)

    def find(self, idstr: str, instance_id: int) -> Entry | None:
        """The entry a section of that name and instance is for. Real names go before aliases."""
        wanted = (idstr, instance_id)
        for entry in self._entries:
            if (entry.idstr, entry.instance_id) == wanted:
                return entry
        return next((entry for entry in self._entries if wanted in entry.aliases), None)

    def blockers(self) -> list[str]:
        """Names of devices that cannot be migrated. To be asked before anything is sent."""
        return [entry.idstr for entry in self if entry.is_unmigratable]

    def save_full_sections(
        self,
        writer: Writer,
        first_section_id: int | None = None,
        *,
        with_footers: bool = True,
        describe: bool = True,
    ) -> SavedSections:
        """Write a FULL section for every device and old-style entry that is needed. The guest must
        stand still.

        :param first_section_id: ids count up from here; None: the ids given at registration.
        :param describe: collect descriptions for the trailer (a postcopy package has none).
        :raises LocalStreamError: a device is unmigratable, a hook failed, or a value does not fit;
            section and field are named.
        :raises OSError: from the writer.
        """
        if blockers := self.blockers():
            raise LocalStreamError(f"these devices cannot be migrated: {', '.join(blockers)}")
        devices = []
        section_id = first_section_id
        for entry in self:
            if not entry.is_needed:
                continue
            number = entry.section_id if section_id is None else section_id
            json = JsonText() if describe else None
            save_full(writer, entry, number, json, with_footer=with_footers)
            if json is not None:
                devices.append(json.text())
            if section_id is not None:
                section_id += 1
        unused = self._next_section_id if section_id is None else section_id
        self._saved = SavedSections(unused, tuple(devices))
        return self._saved

    def load_full_section(
        self, reader: Reader, header: SectionHeader, *, with_footer: bool = False
    ) -> Entry:
        """Read the payload of a FULL section whose header was just read.

        :param with_footer: read and check the footer as well.
        :returns: the entry it was for.
        :raises RemoteStreamError: nobody has that name and instance; version or payload are not
            acceptable.
        """
        entry = self._entry_for(reader, header)
        load_full(reader, entry, header)
        if with_footer:
            check_footer(reader, header)
        return entry

    def vmdesc_json(self, *, page_size: int, configuration: str | None = None) -> bytes:
        """The description trailer for the latest :meth:`save_full_sections`.

        :raises LocalStreamError: nothing was saved yet.
        """
        if self._saved is None:
            raise LocalStreamError("no sections were saved, so there is nothing to describe")
        return self._saved.vmdesc_json(page_size=page_size, configuration=configuration)

    def save_live_setup(self, writer: Writer, *, with_footers: bool = True) -> None:
        """Begin a migration: a START section for every live handler that takes part."""
        self._live = []
        for entry in self:
            if entry.handler is None or not entry.handler.is_active():
                continue
            self._live.append(entry)  # before save_setup: its cleanup is due even when it fails
            write_section_header(writer, entry.header(SectionType.START))
            entry.handler.save_setup(writer)
            self._end_section(writer, entry, with_footers)

    def save_live_iterate(
        self, writer: Writer, budget_bytes: int, *, with_footers: bool = True
    ) -> bool:
        """One round: a PART section of the first handler, and of the next ones once those before
        are through.

        :param budget_bytes: bytes for the round, framing included, all handlers together.
        :returns: whether every handler is through for now.
        """
        start = writer.position
        for entry in self._live:
            handler = entry.handler
            assert handler is not None
            write_section_header(writer, entry.header(SectionType.PART))
            left = max(0, budget_bytes - (writer.position - start))
            done = handler.save_iterate(writer, left)
            self._end_section(writer, entry, with_footers)
            if not done:
                return False
        return True

    def pending_live(self, *, exact: bool) -> PendingEstimate:
        """What is left to send, all handlers together."""
        total = PendingEstimate()
        for entry in self._live:
            assert entry.handler is not None
            total += entry.handler.pending(exact=exact)
        return total

    @property
    def completes_live_before_postcopy(self) -> bool:
        """Whether a handler of this migration must be complete before the switchover."""
        return any(entry.handler and not entry.handler.has_postcopy for entry in self._live)

    def save_live_complete(
        self, writer: Writer, *, postcopy: bool | None = None, with_footers: bool = True
    ) -> None:
        """The END sections, the guest standing still.

        :param postcopy: None: all handlers (a precopy). False: at the switchover of a postcopy,
            those that must be complete before it. True: after it, the others.
        """
        for entry in self._live:
            handler = entry.handler
            assert handler is not None
            if postcopy is not None and handler.has_postcopy != postcopy:
                continue
            write_section_header(writer, entry.header(SectionType.END))
            handler.save_complete(writer)
            self._end_section(writer, entry, with_footers)

    def save_live_cleanup(self) -> None:
        """End a migration in whatever way it ended; every started handler is cleaned up even if one
        fails.
        """
        live, self._live = self._live, []
        _call_all([entry.handler.save_cleanup for entry in live if entry.handler])

    def load_live_setup(self) -> None:
        """Begin an incoming migration."""
        for entry in self:
            if entry.handler is not None:
                entry.handler.load_setup()

    def load_live_section(
        self, reader: Reader, header: SectionHeader, *, with_footer: bool = False
    ) -> Entry:
        """Read the payload of a START, PART or END section whose header was just read."""
        entry = self._entry_for(reader, header)
        if entry.handler is None:
            raise RemoteStreamError(
                f"a {header.type.name} section for state that comes whole",
                offset=reader.position,
                section=header.idstr,
            )
        entry.handler.load(reader, header.version_id)
        if with_footer:
            check_footer(reader, header)
        return entry

    def load_live_cleanup(self) -> None:
        """End an incoming migration in whatever way it ended."""
        _call_all([entry.handler.load_cleanup for entry in self if entry.handler])

    def _add(self, entry: Entry) -> Entry:
        if not 1 <= len(entry.idstr.encode()) <= 255:
            raise ValueError(f"section name {entry.idstr!r} must have 1 to 255 bytes")
        for other in self._entries:
            if (other.idstr, other.instance_id) == (entry.idstr, entry.instance_id):
                raise ValueError(
                    f"{entry.idstr!r} instance {entry.instance_id} is registered already"
                )
        self._entries.append(entry)
        self._next_section_id += 1
        return entry

    def _next_instance(self, idstr: str) -> int:
        """One above the highest instance that name has, also as an alias."""
        used = [entry.instance_id for entry in self._entries if entry.idstr == idstr]
        used += [n for entry in self._entries for name, n in entry.aliases if name == idstr]
        return max(used, default=-1) + 1

    def _entry_for(self, reader: Reader, header: SectionHeader) -> Entry:
        entry = self.find(header.idstr, header.instance_id)
        if entry is None:
            raise RemoteStreamError(
                f"unknown section {header.idstr!r} instance {header.instance_id}",
                offset=reader.position,
                section=header.idstr,
            )
        check_version(reader, entry, header)
        return entry

    @staticmethod
    def _end_section(writer: Writer, entry: Entry, with_footers: bool) -> None:
        if with_footers:
            write_footer(writer, entry.section_id)


def _call_all(functions: Iterable[Any]) -> None:
    """Call every one, then raise the first error, if any."""
    first: Exception | None = None
    for function in functions:
        try:
            function()
        except Exception as error:
            first = first or error
    if first is not None:
        raise first
