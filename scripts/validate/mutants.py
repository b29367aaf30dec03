"""Kernels with one defect each, to show that cases catch it (``--mutate``).

A defect is put under the binding: the C functions that every operation goes through are replaced in
the case's own process, so cases, helpers and subjects all see the broken kernel and none knows.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.validate import defects, raw
from scripts.validate.case import FAMILIES
from scripts.validate.defects import Call
from uffd._native import lib

_PATIENCE_S = 0.5
#: A case on a broken kernel gets no longer than this.
TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Mutant:
    """``breaks`` maps the name of a C function (or of one in :mod:`raw`, ``raw.place``) to what
    makes the broken one out of the real one.
    """

    summary: str
    families: tuple[str, ...]
    breaks: dict[str, Callable[[Call], Call]]


class _BrokenLib:
    """The real C module but for some functions."""

    def __init__(self, broken: dict[str, Call]) -> None:
        self.__dict__.update(broken)

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)


def apply(name: str) -> None:
    """Break this process's kernel for good."""
    mutant = MUTANTS[name]
    broken: dict[str, Call] = {}
    for target, make in mutant.breaks.items():
        if target.startswith("raw."):
            attribute = target.removeprefix("raw.")
            setattr(raw, attribute, make(getattr(raw, attribute)))
        else:
            broken[target] = make(getattr(lib, target))
    proxy = _BrokenLib(broken)
    for module in list(sys.modules.values()):
        name_of = getattr(module, "__name__", "")
        if not name_of.startswith(("uffd.", "scripts.")) or name_of in ("uffd._native", __name__):
            continue
        if getattr(module, "lib", None) is lib:
            vars(module)["lib"] = proxy
        if hasattr(module, "PATIENCE_S"):
            vars(module)["PATIENCE_S"] = _PATIENCE_S  # what hangs will not come


_DESTRUCTIVE = (4, 8, 9)
_GUARDS = (102,)
_POPULATES = (22, 23)

MUTANTS: dict[str, Mutant] = {
    # The cheap and general ones first: whoever looks for one that a case catches starts here.
    "reads-off": Mutant(
        "loads see another byte than is there",
        FAMILIES,
        {"touch_load_u8": defects.load_off, "touch_read": defects.read_off},
    ),
    "marks-flipped": Mutant(
        "pagemap shows write protection the other way",
        FAMILIES,
        {"pagemap_read": defects.entries(1 << 57)},
    ),
    "presence-flipped": Mutant(
        "pagemap shows presence the other way",
        FAMILIES,
        {"pagemap_read": defects.entries(1 << 63)},
    ),
    "wrong-errno": Mutant(
        "every refusal is EIO",
        FAMILIES,
        {
            name: defects.errors_become(5)
            for name in (
                "uffd_register",
                "uffd_unregister",
                "uffd_copy",
                "uffd_zeropage",
                "uffd_continue",
                "uffd_poison",
                "uffd_move",
                "uffd_writeprotect",
                "uffd_wake",
                "uffd_api",
                "mem_madvise",
                "mem_process_madvise",
                "mem_map",
                "raw.ioctl",
                "raw.syscall",
                "pagemap_scan",
            )
        },
    ),
    "no-signals": Mutant(
        "accesses that should be stopped go through",
        FAMILIES,
        {"sigbus_load_u8": defects.copy_if_missing, "sigbus_store_u8": defects.copy_if_missing},
    ),
    "advice-lost": Mutant(
        "DONTNEED, FREE and REMOVE do nothing",
        FAMILIES,
        {"mem_madvise": defects.advice_lost(_DESTRUCTIVE)},
    ),
    "open-any-flag": Mutant(
        "opening takes any flag",
        ("unit",),
        {
            "uffd_open_syscall": defects.takes_any_flag,
            "uffd_open_dev": defects.takes_any_flag,
        },
    ),
    "register-lost": Mutant(
        "REGISTER succeeds and does nothing",
        FAMILIES,
        {"uffd_register": defects.registers_nothing},
    ),
    "copy-wrong-bytes": Mutant(
        "COPY places other bytes", ("unit", "stress", "gaps"), {"uffd_copy": defects.wrong_bytes}
    ),
    "copy-no-wake": Mutant(
        "COPY wakes nobody", ("unit", "stress", "gaps"), {"uffd_copy": defects.sleepy}
    ),
    "zeropage-lost": Mutant(
        "ZEROPAGE says 4 KiB and does nothing",
        ("unit",),
        {"raw.place": defects.placed_success},
    ),
    "move-copies-nothing": Mutant(
        "MOVE succeeds and moves nothing", ("unit",), {"uffd_move": defects.says(defects.PAGE)}
    ),
    "continue-unprotected": Mutant(
        "CONTINUE forgets the WP mode", ("unit",), {"uffd_continue": defects.without_bit(2)}
    ),
    "continue-no-wake": Mutant(
        "CONTINUE wakes nobody", ("unit",), {"uffd_continue": defects.sleepy}
    ),
    "copy-unprotected": Mutant(
        "COPY forgets the WP mode", ("unit",), {"uffd_copy": defects.without_bit(2)}
    ),
    "poison-lost": Mutant(
        "POISON succeeds, no poison", ("unit",), {"uffd_poison": defects.says(defects.PAGE)}
    ),
    "protect-lost": Mutant(
        "WRITEPROTECT succeeds and does nothing",
        ("unit", "mremap-wp", "guard", "scan", "stress"),
        {"uffd_writeprotect": defects.says(0)},
    ),
    "output-untouched": Mutant(
        "the output field keeps what it held",
        ("unit", "gaps"),
        {"raw.place": defects.placed_without_output},
    ),
    "flags-lost": Mutant(
        "messages without flags",
        ("unit", "gaps", "traps"),
        {"uffd_read": defects.messages(defects.no_flags)},
    ),
    "address-off": Mutant(
        "messages name the next page",
        ("unit", "stress", "gaps"),
        {"uffd_read": defects.messages(defects.next_page)},
    ),
    "events-lost": Mutant(
        "fork, remap, remove, unmap are not reported",
        ("unit",),
        {"uffd_read": defects.messages(defects.events_lost)},
    ),
    "register-shows-all": Mutant(
        "REGISTER never refuses and answers the wrong operations",
        ("unit", "errors"),
        {"uffd_register": defects.register_shows_all},
    ),
    "api-zero": Mutant(
        "the raw handshake and reads never refuse", ("unit",), {"raw.ioctl": defects.accepting}
    ),
    "guard-bit-flipped": Mutant(
        "pagemap shows guards the other way", ("guard",), {"pagemap_read": defects.entries(1 << 58)}
    ),
    "scan-forgets": Mutant(
        "the scan loses a region", ("scan",), {"pagemap_scan": defects.scan_short}
    ),
    "scan-ignores-masks": Mutant(
        "the scan selects everything",
        ("scan", "traps"),
        {"pagemap_scan": defects.scan_ignores_masks},
    ),
    "accesses-stopped": Mutant(
        "every guarded access is stopped",
        ("advice", "guard", "mkdirty"),
        {"sigbus_load_u8": defects.stopped, "sigbus_store_u8": defects.stopped},
    ),
    "scan-no-protect": Mutant(
        "the scan never protects", ("scan",), {"pagemap_scan": defects.scan_unprotecting}
    ),
    "scan-wrong-category": Mutant(
        "the scan shows the opposite",
        ("scan", "rwp"),
        {"pagemap_scan": defects.scan_wrong_categories},
    ),
    "scan-accepts-all": Mutant(
        "the scan refuses nothing",
        ("scan",),
        {"pagemap_scan": defects.scan_never_refuses, "raw.ioctl": defects.accepting},
    ),
    "guards-lost": Mutant(
        "guards are not installed", ("guard",), {"mem_madvise": defects.advice_lost(_GUARDS)}
    ),
    "populate-lost": Mutant(
        "populating does nothing", ("populate",), {"mem_madvise": defects.advice_lost(_POPULATES)}
    ),
    "process-advice-lost": Mutant(
        "process_madvise never refuses",
        ("pmadvise",),
        {"mem_process_madvise": defects.accepting, "raw.syscall": defects.accepting},
    ),
}


def of_family(family: str) -> list[str]:
    """The defects that cases of this family are to catch."""
    return [name for name, mutant in MUTANTS.items() if family in mutant.families]
