"""Guest RAM of ``run`` once it is allocated: populated where wanted, described, looked over."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from guestmem import Backing, RAMBlock
from migration.monitor.units import format_size
from migration.runtime.memory_report import misplaced
from migration.toyvm import ToyMachine
from migration.toyvm.machine import ReportPrealloc

Tell = Callable[[str, str, dict[str, object]], None]
"""``tell(event, text, data)``."""

_SLOW_BYTES = 1 << 30


def report_progress(tell: Tell) -> ReportPrealloc:
    """For :class:`~migration.toyvm.ToyMachine`: says how far it is, for blocks that take long."""
    told: dict[str, int] = {}

    def progress(idstr: str, done: int, total: int) -> None:
        share = done * 100 // total
        if total < _SLOW_BYTES or told.get(idstr) == share:
            return
        told[idstr] = share
        text = f"preallocating {idstr}: {share} % of {format_size(total)}"
        tell("X_PREALLOC", text, {"id": idstr, "done": done, "total": total})

    return progress


def warn(machine: ToyMachine, tell: Tell) -> None:
    """Tell of RAM that is not as it was asked for."""
    for text in warnings(machine):
        tell("X_WARNING", f"warning: {text}", {"text": text})


def warnings(machine: ToyMachine) -> Iterator[str]:
    """What a user may not have wanted."""
    for block in machine.ram:
        backend = machine.options.backend_of(block.idstr)
        if block.backing is Backing.FILE and not block.is_hugetlb:
            yield (
                f"RAM block {block.idstr!r}: {backend.path} is on no file system of huge pages, "
                f"its pages are {format_size(block.page_size)}; --hugepage-size 2M "
                "(x-page-size=2M) makes that an error, 'postcopy hugepages mount' makes one"
            )
    yield from misplaced(machine.ram)


def describe(machine: ToyMachine) -> str:
    """``512 MiB anon RAM``, or block by block when there are several kinds."""
    kinds = {(block.backing, block.page_size) for block in machine.ram}
    if len(kinds) == 1:
        block = next(iter(machine.ram))
        return f"{format_size(machine.ram.total_length)} {_kind(block)} RAM"
    return "RAM " + " + ".join(
        f"{block.idstr} {format_size(block.used_length)} {_kind(block)}" for block in machine.ram
    )


def _kind(block: RAMBlock) -> str:
    name = block.backing.value
    return f"{name} ({format_size(block.page_size)} pages)" if block.is_hugetlb else name
