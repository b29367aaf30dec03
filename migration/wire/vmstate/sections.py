"""What is registered under a section name, and how one such section is written and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..constants import SectionType
from ..errors import RemoteStreamError, StreamError
from ..headers import SectionHeader, write_footer, write_section_header
from ..io import Reader, Writer
from .context import LoadContext, SaveContext
from .description import MigrationPriority, VMStateDescription
from .jsontext import JsonText
from .live import LiveStateHandler

Save = Callable[[Writer], None]
Load = Callable[[Reader, int], None]
Alias = tuple[str, int]


@dataclass(eq=False, slots=True, kw_only=True)
class Entry:
    """One registered thing: a device, a pair of old-style functions, or a live handler.

    :ivar idstr: section name: the description's, behind the bus path if there is one.
    :ivar section_id: number used for it when the caller does not choose one; registration order, as
        in QEMU.
    :ivar aliases: other (name, instance) pairs under which older sources send it.
    """

    idstr: str
    instance_id: int
    version_id: int
    minimum_version_id: int
    section_id: int
    priority: MigrationPriority = MigrationPriority.DEFAULT
    aliases: tuple[Alias, ...] = ()
    vmsd: VMStateDescription | None = None
    obj: Any = None
    save: Save | None = None
    load: Load | None = None
    handler: LiveStateHandler | None = None

    @property
    def oldest_version_id(self) -> int:
        """Oldest version its loader takes."""
        if self.vmsd is not None and self.vmsd.minimum_version_id_old is not None:
            return self.vmsd.minimum_version_id_old
        return self.minimum_version_id

    @property
    def is_needed(self) -> bool:
        """Whether its FULL section is sent. Live handlers have none."""
        if self.handler is not None:
            return False
        return self.vmsd is None or self.vmsd.is_needed(self.obj)

    @property
    def is_unmigratable(self) -> bool:
        """Whether it blocks migration."""
        return self.vmsd is not None and self.vmsd.unmigratable

    def header(self, kind: SectionType, section_id: int | None = None) -> SectionHeader:
        """The header of a section of its."""
        number = self.section_id if section_id is None else section_id
        return SectionHeader(kind, number, self.idstr, self.instance_id, self.version_id)


def save_full(
    writer: Writer, entry: Entry, section_id: int, json: JsonText | None, *, with_footer: bool
) -> None:
    """Write a FULL section, and its description as one object into ``json``."""
    write_section_header(writer, entry.header(SectionType.FULL, section_id))
    if json is not None:
        json.start_object()
        json.string("name", entry.idstr)
        json.integer("instance_id", entry.instance_id)
    if entry.vmsd is not None:
        entry.vmsd.save(writer, entry.obj, section=entry.idstr, description=json)
    else:
        _save_old_style(writer, entry, json)
    if json is not None:
        json.end_object()
    if with_footer:
        write_footer(writer, section_id)


def _save_old_style(writer: Writer, entry: Entry, json: JsonText | None) -> None:
    ctx = SaveContext(writer, section=entry.idstr)
    start = ctx.position
    assert entry.save is not None
    try:
        entry.save(ctx)
    except (StreamError, OSError):
        raise
    except Exception as error:
        raise ctx.error(f"old-style save failed: {error}") from error
    if json is None:
        return
    size = ctx.position - start
    json.integer("size", size)
    json.start_array("fields")
    json.start_object()
    json.string("name", "data")
    json.integer("size", size)
    json.string("type", "buffer")
    json.end_object()
    json.end_array()


def load_full(reader: Reader, entry: Entry, header: SectionHeader) -> None:
    """Read the payload of a FULL section into ``entry``."""
    if entry.vmsd is not None:
        entry.vmsd.load(reader, entry.obj, header.version_id, section=header.idstr)
        return
    ctx = LoadContext(reader, section=header.idstr)
    if entry.load is None:
        raise ctx.error("a FULL section for state that comes in rounds")
    try:
        entry.load(ctx, header.version_id)
    except (StreamError, OSError):
        raise
    except Exception as error:
        raise ctx.error(f"old-style load failed: {error}") from error


def check_version(reader: Reader, entry: Entry, header: SectionHeader) -> None:
    """Refuse a version above ours or below our oldest.

    :raises RemoteStreamError: with both versions.
    """
    if header.version_id > entry.version_id:
        reason = f"version {header.version_id} is newer than our {entry.version_id}"
    elif header.version_id < entry.oldest_version_id:
        reason = f"version {header.version_id} is older than our oldest, {entry.oldest_version_id}"
    else:
        return
    raise RemoteStreamError(reason, offset=reader.position, section=header.idstr)
