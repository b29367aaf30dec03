"""Where the threads run that a waiting vCPU depends on: fault, listen, preempt and return path.

They wake one another in a chain, and on some machines a wake-up across processors costs ten times
one on the same processor. What is best is measured by whoever makes the service (see
:func:`migration.bench.choose_placement`), and only carried out here.

Source: sched_setaffinity(2), per thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Protocol


class Placement(Protocol):
    """Processor numbers by role."""

    @property
    def fault_cpus(self) -> tuple[int, ...]:
        """For the threads a waiting vCPU depends on step by step."""
        ...

    @property
    def data_cpus(self) -> tuple[int, ...]:
        """For the thread that pushes in bulk."""
        ...


ChoosePlacement = Callable[[], Placement]


def move_here(cpus: Iterable[int]) -> None:
    """Move the calling thread to these processors; none means: leave it where it is.

    A processor that went away meanwhile costs speed, nothing else.
    """
    wanted = set(cpus)
    if wanted:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, wanted)
