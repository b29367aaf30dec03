"""Which combinations of path, mode, transport, RAM and backing are run: pairs, or all of them.

Pairwise: every two values of different dimensions meet in at least one case. Chosen greedily and
without chance, so a case keeps its name.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.support.guest_hops import MODES, MULTI_CHANNEL, TRANSPORTS
from tests.support.guest_vm import BACKINGS
from tests.support.qemu import MIB

FULL_VARIABLE = "POSTCOPY_INTEROP"
PATHS = ("park", "relay", "again")
RAM_BYTES = (32 * MIB, 1024 * MIB, 4096 * MIB)
_HUGE_RAM_MAX = 32 * MIB  # hugetlb has no sparse reads: all of it would have to be there
_SHARED_SCAN_MAX = 1024 * MIB  # a QEMU that reads holes of a memfd fills them: minutes at 4 GiB


@dataclass(frozen=True, slots=True)
class Case:
    """One combination."""

    path: str
    mode: str
    transport: str
    ram_bytes: int
    backing: str

    def __str__(self) -> str:
        ram = f"{self.ram_bytes // MIB}M"
        return "-".join((self.path, self.mode, self.transport, ram, self.backing))

    @property
    def is_possible(self) -> bool:
        """A preempt channel needs a transport that has a second one."""
        return self.mode != "preempt" or self.transport in MULTI_CHANNEL

    @property
    def is_quick(self) -> bool:
        """Fit for a run that should take minutes."""
        if self.backing == "hugetlb":
            return self.ram_bytes <= _HUGE_RAM_MAX
        return self.backing != "memfd" or self.ram_bytes <= _SHARED_SCAN_MAX


def wants_all() -> bool:
    """Whether the full product was asked for (``make test-interop`` does)."""
    return os.environ.get(FULL_VARIABLE) == "full"


def cases() -> list[Case]:
    """The cases of this run."""
    dimensions = (PATHS, MODES, TRANSPORTS, RAM_BYTES, BACKINGS)
    every = [case for case in map(_case, itertools.product(*dimensions)) if case.is_possible]
    return every if wants_all() else list(_pairwise([case for case in every if case.is_quick]))


def _case(values: tuple[str, str, str, int, str]) -> Case:
    return Case(*values)


def _pairwise(candidates: Sequence[Case]) -> Iterator[Case]:
    open_pairs = set().union(*map(_pairs, candidates))
    while open_pairs:
        best = max(candidates, key=lambda case: len(_pairs(case) & open_pairs))
        open_pairs -= _pairs(best)
        yield best


def _pairs(case: Case) -> set[tuple[tuple[int, object], tuple[int, object]]]:
    values = (case.path, case.mode, case.transport, case.ram_bytes, case.backing)
    return set(itertools.combinations(enumerate(values), 2))
