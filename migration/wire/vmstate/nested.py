"""Elements made of other descriptions: structs, lists, trees, helper objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .context import LoadContext, SaveContext
from .elements import U32, U64, Element

if TYPE_CHECKING:
    from .description import VMStateDescription

LIST_MAX = 1 << 16
"""Elements a list or tree may have unless its field says otherwise."""

New = Callable[[], Any]
"""Makes an empty object for a loader to fill."""


class StructOf(Element):
    """A nested object: its fields, then its subsections. **No version is on the wire**: it is
    written with our current version of ``vmsd`` and read with the reader's, so a nested description
    must grow by subsections, never by raising its version.

    :param new: makes the object when there is none yet to load into (arrays whose count comes from
        the stream).
    """

    type_name = "struct"
    opens_struct = True

    def __init__(self, vmsd: VMStateDescription, *, new: New | None = None) -> None:
        self.vmsd = vmsd
        self.new = new
        self._version = vmsd.version_id

    @property
    def compressible(self) -> bool:
        return self.vmsd.compressible

    @property
    def fixed_size(self) -> bool:
        return self.vmsd.compressible

    @property
    def nested_name(self) -> str | None:
        return self.vmsd.name

    def encode(self, ctx: SaveContext, value: Any) -> None:
        if value is None:
            raise ctx.error(f"no {self.vmsd.name} object to save")
        self.vmsd.save_into(ctx, value, self._version)

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        if current is None:
            if self.new is None:
                raise ctx.error(f"no {self.vmsd.name} object to load into, and none can be made")
            current = self.new()
        self.vmsd.load_into(ctx, current, self._version)
        return current


class VStructOf(StructOf):
    """A nested object of a version stated by the parent (still none on the wire)."""

    type_name = "vstruct"
    opens_struct = False

    def __init__(
        self, vmsd: VMStateDescription, *, struct_version_id: int, new: New | None = None
    ) -> None:
        super().__init__(vmsd, new=new)
        if not vmsd.minimum_version_id <= struct_version_id <= vmsd.version_id:
            raise ValueError(f"{vmsd.name} has no version {struct_version_id}")
        self._version = struct_version_id


class TmpOf(Element):
    """Fields of a helper object that exists only while they are saved or loaded.

    ``new(parent)`` makes the helper; the helper description's pre_save fills it from the parent and
    its post_load puts what came in where it belongs.
    """

    type_name = "tmp"

    def __init__(self, vmsd: VMStateDescription, *, new: Callable[[Any], Any]) -> None:
        self.vmsd = vmsd
        self.new = new

    @property
    def fixed_size(self) -> bool:
        return self.vmsd.compressible

    @property
    def nested_name(self) -> str | None:
        return self.vmsd.name

    def encode(self, ctx: SaveContext, value: Any) -> None:
        self.vmsd.save_into(ctx, self.new(value), self.vmsd.version_id)

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        self.vmsd.load_into(ctx, self.new(current), self.vmsd.version_id)
        return current


class ListOf(Element):
    """A list of objects: per object 0x01 and the object, 0x00 at the end. The value is a Python
    list.

    :param element_version_id: version the receiver reads the objects with; the current one unless
        said otherwise.
    :param limit: most objects accepted.
    """

    def __init__(
        self,
        vmsd: VMStateDescription,
        *,
        new: New,
        kind: str = "qtailq",
        element_version_id: int | None = None,
        limit: int = LIST_MAX,
    ) -> None:
        self.type_name = kind
        self.vmsd = vmsd
        self.new = new
        self.limit = limit
        self.version_id = vmsd.version_id if element_version_id is None else element_version_id

    @property
    def fixed_size(self) -> bool:
        return False

    def encode(self, ctx: SaveContext, value: Any) -> None:
        for index, item in enumerate(value):
            ctx.push(f"[{index}]")
            ctx.write(b"\x01")
            self.vmsd.save_into(ctx, item, self.vmsd.version_id)
            ctx.pop()
        ctx.write(b"\x00")

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        items: list[Any] = []
        while read_more(ctx):
            ctx.count(1, self.limit)
            if len(items) == self.limit:
                raise ctx.error(f"more than {self.limit} elements")
            ctx.push(f"[{len(items)}]")
            item = self.new()
            self.vmsd.load_into(ctx, item, self.version_id)
            items.append(item)
            ctx.pop()
        return items


class TreeOf(Element):
    """A tree: be32 count, per node 0x01, key, value, and 0x00 at the end.

    With integer keys (be64) the value is a ``dict`` and nodes go out in key order. With struct keys
    (``key_vmsd``) it is a list of (key, value) pairs, in the caller's order, because such keys need
    not be hashable.
    """

    type_name = "gtree"

    def __init__(
        self,
        vmsd: VMStateDescription,
        *,
        new: New,
        key_vmsd: VMStateDescription | None = None,
        key_new: New | None = None,
        limit: int = LIST_MAX,
    ) -> None:
        if (key_vmsd is None) != (key_new is None):
            raise ValueError("key_vmsd and key_new come together")
        self.vmsd = vmsd
        self.new = new
        self.key_vmsd = key_vmsd
        self.key_new = key_new
        self.limit = limit

    @property
    def fixed_size(self) -> bool:
        return False

    def encode(self, ctx: SaveContext, value: Any) -> None:
        nodes = sorted(value.items()) if self.key_vmsd is None else list(value)
        U32.encode(ctx, len(nodes))
        for index, (key, item) in enumerate(nodes):
            ctx.push(f"[{index}]")
            ctx.write(b"\x01")
            if self.key_vmsd is None:
                U64.encode(ctx, key)
            else:
                self.key_vmsd.save_into(ctx, key, self.key_vmsd.version_id)
            self.vmsd.save_into(ctx, item, self.vmsd.version_id)
            ctx.pop()
        ctx.write(b"\x00")

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        count = U32.decode(ctx, None)
        ctx.count(count, self.limit)
        pairs: list[tuple[Any, Any]] = []
        while read_more(ctx):
            if len(pairs) == count:
                raise ctx.error(f"more than the {count} nodes announced")
            ctx.push(f"[{len(pairs)}]")
            pairs.append(self._node(ctx))
            ctx.pop()
        if len(pairs) != count:
            raise ctx.error(f"{len(pairs)} nodes, {count} announced")
        if self.key_vmsd is not None:
            return pairs
        tree = dict(pairs)
        if len(tree) != count:
            raise ctx.error("a key comes twice")
        return tree

    def _node(self, ctx: LoadContext) -> tuple[Any, Any]:
        if self.key_vmsd is None or self.key_new is None:
            key = U64.decode(ctx, None)
        else:
            key = self.key_new()
            self.key_vmsd.load_into(ctx, key, self.key_vmsd.version_id)
        item = self.new()
        self.vmsd.load_into(ctx, item, self.vmsd.version_id)
        return key, item


def read_more(ctx: LoadContext) -> bool:
    """The byte in front of each list element: 1 there is one, 0 the end."""
    at = ctx.position
    mark = ctx.read(1)
    if mark not in (b"\x00", b"\x01"):
        raise ctx.error(f"{mark[0]:#04x} where a list goes on (1) or ends (0)", offset=at)
    return mark == b"\x01"
