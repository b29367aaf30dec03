"""The description of a device's state, interpreted both for saving and for loading, so that the two
cannot drift.

Payload of a section: the fields in order, then the subsections. No names, lengths, tags or
alignment, except that each subsection is ``05, u8 n, name, be32 version`` and then again fields and
subsections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from ..constants import SectionType
from ..errors import StreamError, TruncatedStreamError
from ..io import Reader, Writer
from .context import DEPTH_MAX, LoadContext, SaveContext
from .fields import Field
from .jsontext import JsonText
from .shapes import Validate

_NAME_BYTES_MAX = 255
_SUBSECTION_MARK = bytes([SectionType.SUBSECTION])

Hook = Callable[[Any], None]
PostLoad = Callable[[Any, int], None]
LoadOld = Callable[[Reader, Any, int], None]


class MigrationPriority(IntEnum):
    """Order of device sections: high first, equal ones as registered. A device goes before those
    that need it.
    """

    DEFAULT = 0
    IOMMU = 1
    PCI_BUS = 2
    VIRTIO_MEM = 3
    GICV3_ITS = 4
    GICV3 = 5


@dataclass(frozen=True, eq=False, kw_only=True)
class VMStateDescription:
    """What of an object goes onto the wire, in which version, and what to do around it.

    :param name: name in the section header (behind the bus path, if any), 1 to 255 ASCII
        characters.
    :param version_id: version we write. A section of a newer version is refused.
    :param minimum_version_id: oldest version that loads through ``fields``.
    :param minimum_version_id_old: oldest version ``load_state_old`` understands; it gets versions
        below ``minimum_version_id`` instead of the fields, hooks and subsections.
    :param fields: in wire order.
    :param subsections: optional parts, each with a ``needed``; named ``<name>/<part>`` (or at least
        beginning with ``name``). Those not needed are not sent; those not received leave the object
        as ``pre_load`` made it.
    :param pre_save: before the fields are written: bring the object's attributes up to date.
    :param post_save: after the subsections, also when writing failed.
    :param pre_load: before the first byte: set the defaults for whatever may not come.
    :param post_load: ``post_load(obj, version_id)`` after all subsections, parents after children:
        check and apply.
    :param needed: whether the section (or subsection) is sent at all.
    :param unmigratable: the device blocks migration.
    :param priority: place among the device sections.

    A hook fails the migration by raising any exception; its text ends up in the error. Hooks and
    the methods below run in the calling thread; nothing here locks. Descriptions are immutable and
    may be shared by threads.

    Source: QEMU ``docs/devel/migration/main.rst``, ``migration/vmstate.c``.
    """

    name: str
    version_id: int = 0
    minimum_version_id: int = 0
    minimum_version_id_old: int | None = None
    fields: tuple[Field, ...] = ()
    subsections: tuple[VMStateDescription, ...] = ()
    pre_save: Hook | None = None
    post_save: Hook | None = None
    pre_load: Hook | None = None
    post_load: PostLoad | None = None
    needed: Callable[[Any], bool] | None = None
    load_state_old: LoadOld | None = None
    unmigratable: bool = False
    priority: MigrationPriority = MigrationPriority.DEFAULT
    _labels: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        object.__setattr__(self, "subsections", tuple(self.subsections))
        object.__setattr__(self, "_labels", _unique_labels(self.fields))
        self._check_versions()
        self._check_names()

    def _check_versions(self) -> None:
        if not 0 <= self.minimum_version_id <= self.version_id < 1 << 31:
            raise ValueError(
                f"{self.name}: minimum version {self.minimum_version_id}, version {self.version_id}"
            )
        if (self.minimum_version_id_old is None) != (self.load_state_old is None):
            raise ValueError(f"{self.name}: load_state_old and minimum_version_id_old go together")
        old = self.minimum_version_id_old
        if old is not None and not 0 <= old <= self.minimum_version_id:
            raise ValueError(f"{self.name}: minimum_version_id_old {old}")

    def _check_names(self) -> None:
        if not (self.name.isascii() and 1 <= len(self.name) <= _NAME_BYTES_MAX):
            raise ValueError(f"description name {self.name!r} must be 1 to 255 ASCII characters")
        seen: set[str] = set()
        names = [entry.name for entry in self.fields]
        for entry in self.fields:
            source = entry.counts_by
            if source in names and source not in seen:
                raise ValueError(f"{self.name}: {source!r} must be sent before {entry.name!r}")
            seen.add(entry.name)
        for sub in self.subsections:
            if not sub.name.startswith(self.name) or len(sub.name) <= len(self.name):
                raise ValueError(f"a receiver of {self.name!r} would not look for {sub.name!r}")
        if len({sub.name for sub in self.subsections}) != len(self.subsections):
            raise ValueError(f"{self.name}: two subsections have the same name")
        self._check_last_field()

    def _check_last_field(self) -> None:
        """A struct at the end would take our subsections for its own if the names allow it."""
        nested = self.fields[-1].nested_name if self.fields else None
        for sub in self.subsections:
            if nested is not None and sub.name.startswith(nested):
                raise ValueError(
                    f"{self.name}: {nested!r}, the last field, would take {sub.name!r}"
                )

    @property
    def compressible(self) -> bool:
        """All objects of this kind look alike on the wire, so an array of them is described
        once.
        """
        return not self.subsections and all(entry.compressible for entry in self.fields)

    def is_needed(self, obj: Any) -> bool:
        """Whether ``obj``'s section is to be sent."""
        return self.needed is None or bool(self.needed(obj))

    def save(
        self,
        writer: Writer,
        obj: Any,
        *,
        section: str | None = None,
        description: JsonText | None = None,
    ) -> None:
        """Write the payload of ``obj``: fields, then needed subsections.

        :param section: name for error texts; the description's own by default.
        :param description: gets ``vmsd_name``, ``version``, ``fields`` and ``subsections`` as
            members of the object that is open in it.
        :raises LocalStreamError: a value does not fit its field, or a hook failed; section, offset
            and field are named.
        :raises OSError: from the writer.
        """
        ctx = SaveContext(writer, section=section or self.name, json=description)
        self.save_into(ctx, obj, self.version_id)

    def load(
        self, reader: Reader, obj: Any, version_id: int, *, section: str | None = None
    ) -> None:
        """Read a payload of ``version_id`` into ``obj``.

        The payload has no end of its own: this stops after the last subsection of ours. What
        follows must be the footer, which the caller checks. After an error ``obj`` is half loaded
        and must not be used.

        :raises RemoteStreamError: unacceptable version, value, length or subsection, or a hook
            failed; section, offset and field are named.
        :raises TruncatedStreamError: the stream ends inside the payload.
        """
        self.load_into(LoadContext(reader, section=section or self.name), obj, version_id)

    def save_into(self, ctx: SaveContext, obj: Any, version_id: int) -> None:
        """:meth:`save` as part of something bigger, in a version of the parent's choice."""
        self._run_save_hook(ctx, "pre_save", self.pre_save, obj)
        try:
            self._save_fields(ctx, obj, version_id)
            self._save_subsections(ctx, obj)
        except BaseException:
            if self.post_save is not None:
                with suppress(Exception):
                    self.post_save(obj)
            raise
        self._run_save_hook(ctx, "post_save", self.post_save, obj)

    def _save_fields(self, ctx: SaveContext, obj: Any, version_id: int) -> None:
        json = ctx.json
        if json is not None:
            json.string("vmsd_name", self.name)
            json.integer("version", version_id)
            json.start_array("fields")
        for entry, label in zip(self.fields, self._labels, strict=True):
            ctx.push(entry.name)
            if isinstance(entry, Validate) and not entry.check(obj, version_id):
                raise ctx.error("this condition does not hold")
            if entry.exists(obj, version_id):
                entry.save(ctx, obj, label)
            ctx.pop()
        if json is not None:
            json.end_array()

    def _save_subsections(self, ctx: SaveContext, obj: Any) -> None:
        needed = [sub for sub in self.subsections if sub.is_needed(obj)]
        if not needed:
            return
        if ctx.json is not None:
            ctx.json.start_array("subsections")
        for sub in needed:
            name = sub.name.encode("ascii")
            ctx.write(_SUBSECTION_MARK + bytes([len(name)]) + name)
            ctx.write(sub.version_id.to_bytes(4, "big"))
            if ctx.json is not None:
                ctx.json.start_object()
            ctx.push(sub.name)
            sub.save_into(ctx, obj, sub.version_id)
            ctx.pop()
            if ctx.json is not None:
                ctx.json.end_object()
        if ctx.json is not None:
            ctx.json.end_array()

    def load_into(self, ctx: LoadContext, obj: Any, version_id: int) -> None:
        """:meth:`load` as part of something bigger."""
        if len(ctx.path) > DEPTH_MAX:
            raise ctx.error(f"nested deeper than {DEPTH_MAX}")
        if version_id > self.version_id:
            raise ctx.error(f"{self.name} version {version_id} is newer than our {self.version_id}")
        if version_id < self.minimum_version_id:
            self._load_old(ctx, obj, version_id)
            return
        if self.pre_load is not None:
            self._run_load_hook(ctx, "pre_load", self.pre_load, obj)
        for entry in self.fields:
            ctx.push(entry.name)
            if isinstance(entry, Validate) and not entry.check(obj, version_id):
                raise ctx.error("this condition does not hold")
            if entry.exists(obj, version_id):
                entry.load(ctx, obj)
            ctx.pop()
        self._load_subsections(ctx, obj)
        if self.post_load is not None:
            self._run_load_hook(ctx, "post_load", self.post_load, obj, version_id)

    def _load_old(self, ctx: LoadContext, obj: Any, version_id: int) -> None:
        oldest = self.minimum_version_id_old
        if self.load_state_old is None or oldest is None or version_id < oldest:
            least = self.minimum_version_id if oldest is None else oldest
            raise ctx.error(f"{self.name} version {version_id} is older than our oldest, {least}")
        self._run_load_hook(ctx, "load_state_old", self.load_state_old, ctx, obj, version_id)

    def _load_subsections(self, ctx: LoadContext, obj: Any) -> None:
        by_name = {sub.name.encode("ascii"): sub for sub in self.subsections}
        seen: set[bytes] = set()
        while (name := self._peek_subsection(ctx)) is not None:
            sub = by_name.get(name)
            shown = name.decode("ascii", "backslashreplace")
            if sub is None:
                raise ctx.error(f"unknown subsection {shown!r} of {self.name!r}")
            if name in seen:
                raise ctx.error(f"subsection {shown!r} comes twice")
            seen.add(name)
            ctx.push(shown)
            ctx.read(2 + len(name))
            sub.load_into(ctx, obj, int.from_bytes(ctx.read(4), "big"))
            ctx.pop()

    def _peek_subsection(self, ctx: LoadContext) -> bytes | None:
        """Name of the subsection that comes next, if one of ours does.

        A 0x05 can also be data of the parent or the parent's own subsection; only the name tells,
        as for QEMU. (A parent whose next data happens to read like a subsection of this name is
        beyond telling apart.)
        """
        if ctx.peek(1) != _SUBSECTION_MARK:
            return None
        head = ctx.peek(2)
        own = self.name.encode("ascii")
        if len(head) < 2 or head[1] <= len(own):
            return None
        name = ctx.peek(2 + head[1])[2:]
        if not name.startswith(own):
            return None
        if len(name) < head[1]:
            raise TruncatedStreamError(
                f"in the name of a subsection of {self.name!r}",
                offset=ctx.position,
                section=ctx.section,
            )
        return name

    def _run_save_hook(self, ctx: SaveContext, what: str, hook: Hook | None, obj: Any) -> None:
        if hook is None:
            return
        try:
            hook(obj)
        except StreamError:
            raise
        except Exception as error:
            raise ctx.error(f"{what} of {self.name!r} failed: {error}") from error

    def _run_load_hook(
        self, ctx: LoadContext, what: str, hook: Callable[..., None], *args: Any
    ) -> None:
        try:
            hook(*args)
        except StreamError:
            raise
        except Exception as error:
            raise ctx.error(f"{what} of {self.name!r} failed: {error}") from error


def _unique_labels(fields: tuple[Field, ...]) -> tuple[str, ...]:
    """Field names as described: ``name[k]`` for the k-th of several that share a name."""
    total = Counter(entry.name for entry in fields)
    seen: Counter[str] = Counter()
    labels = []
    for entry in fields:
        number = seen[entry.name]
        seen[entry.name] += 1
        labels.append(f"{entry.name}[{number}]" if total[entry.name] > 1 else entry.name)
    return tuple(labels)
