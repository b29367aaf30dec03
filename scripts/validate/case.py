"""The registry of cases: what each is called, what it needs, which memory types it runs on."""

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.validate.host import Need, hugepages, traps_kernel_faults
from scripts.validate.kinds import KINDS, Kind

if TYPE_CHECKING:
    from scripts.validate.bench import Bench

Body = Callable[["Bench"], None]
Needs = Callable[[str], Iterable[Need]]


@dataclass(frozen=True)
class Case:
    """One thing validated on one memory type (or other ``variant``; ``""`` when there is none)."""

    family: str
    name: str
    variant: str
    body: Body
    needs: tuple[Need, ...]
    timeout_s: float

    @property
    def id(self) -> str:
        variant = f"[{self.variant}]" if self.variant else ""
        return f"{self.family}/{self.name}{variant}"

    @property
    def kind(self) -> Kind | None:
        """The memory type, if the variant starts with one (``anon``, ``anon:swapped``)."""
        return KINDS.get(self.variant.split(":")[0])

    @property
    def summary(self) -> str:
        """What it validates: its docstring, on one line."""
        return " ".join((self.body.__doc__ or "").split())

    def matches(self, pattern: str) -> bool:
        """A glob over the whole id, or part of it."""
        return pattern in self.id or fnmatch.fnmatchcase(self.id, pattern)


REGISTRY: dict[str, Case] = {}
#: The order of the report.
FAMILIES = (
    *("unit", "rwp", "stress", "mremap-wp", "scan", "guard", "populate", "advice"),
    *("dontunmap", "pmadvise", "mkdirty", "merge", "errors", "gaps", "traps"),
)


def case(
    family: str,
    *,
    on: Iterable[str] = ("",),
    needs: Iterable[Need] = (),
    needs_of: Needs | None = None,
    name: str | None = None,
    timeout_s: float = 20.0,
) -> Callable[[Body], Body]:
    """Register a function as a case, once for each variant of ``on``.

    :param needs: what every variant needs. :param needs_of: what one variant needs besides.
    :param name: default: the function's name, with hyphens.
    """

    if family not in FAMILIES:
        raise ValueError(f"no family {family}")

    def register(body: Body) -> Body:
        for variant in on:
            wanted = [traps_kernel_faults(), *needs]
            if variant.split(":")[0].startswith("hugetlb"):
                wanted.append(hugepages())
            if needs_of is not None:
                wanted.extend(needs_of(variant))
            label = name or body.__name__.replace("_", "-")
            found = Case(family, label, variant, body, tuple(wanted), timeout_s)
            if found.id in REGISTRY:
                raise ValueError(f"two cases are called {found.id}")
            REGISTRY[found.id] = found
        return body

    return register


def select(only: Iterable[str] = ()) -> list[Case]:
    """All cases, or those that match one of the patterns, by family and name as written."""
    import scripts.validate.cases  # noqa: F401  (registers them)

    wanted = list(only)
    found = [c for c in REGISTRY.values() if not wanted or any(c.matches(p) for p in wanted)]
    # Where one body is a case of two families, the decorators register the inner one first.
    return sorted(found, key=lambda c: FAMILIES.index(c.family))
