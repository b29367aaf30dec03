"""Where the runtime's threads should run: measured, not guessed.

A remote fault is a chain of short steps on different threads, each waking the next. Where a
sleeping processor is woken through a hypervisor, a wake-up across processors costs ten times one on
the same processor, and the chain is nothing but wake-ups. Where wake-ups are cheap everywhere,
keeping threads together only makes them wait for each other. Both kinds of machine look alike from
outside, so the answer is measured when it is needed, in a few milliseconds.

The bulk sender stays free in either case: it seldom sleeps, so it is seldom woken. Measured with
two processes on two dear-to-wake processors: keeping fault, listen and return-path thread together
halves the worst fault latencies and costs no throughput; parting listen thread and fault thread, or
source and destination, doubles the median on an idle stream.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from . import native
from .results import percentile

# From here on a wake-up across processors is dear enough to give up the scheduler's freedom for.
# Below it, an idle second processor is worth more than a warm first one.
PIN_RATIO = 2.0
_ROUNDS_MAX = 400
_WARMUP = 5
_PAIRS_MAX = 3  # of processors; more would only measure the same thing again


@dataclass(frozen=True, slots=True)
class WakeCost:
    """Half a measured round trip between two sleeping threads: what one wake-up costs."""

    from_cpu: int
    to_cpu: int
    p50_ns: int
    p90_ns: int
    samples: int

    @property
    def is_same(self) -> bool:
        """Both threads on one processor."""
        return self.from_cpu == self.to_cpu


@dataclass(frozen=True, slots=True)
class Placement:
    """Where to run what.

    :ivar fault_cpus: for the threads a waiting vCPU depends on step by step: fault, listen and
        return-path thread. Never empty.
    :ivar data_cpus: for the thread that pushes in bulk: the source's migration thread. Never empty.
    :ivar reason: one sentence for the log and for ``--json``.
    :ivar measured: the wake-up costs it rests on; empty when there was nothing to choose.
    """

    fault_cpus: tuple[int, ...]
    data_cpus: tuple[int, ...]
    reason: str
    measured: tuple[WakeCost, ...]

    @property
    def same_ns(self) -> int | None:
        """Typical cost of a wake-up on one processor."""
        return _typical(self.measured, same=True)

    @property
    def cross_ns(self) -> int | None:
        """Typical cost of a wake-up across processors."""
        return _typical(self.measured, same=False)

    @property
    def is_pinned(self) -> bool:
        """True when the recommendation keeps the latency path on one processor."""
        return len(self.fault_cpus) == 1


def choose_placement(cpus: Sequence[int] | None = None, budget_ms: int = 30) -> Placement:
    """Measure wake-up costs and recommend processors for the runtime's threads.

    Call it before the threads start, from a thread that may sleep: it makes pairs of threads that
    wake each other, without the interpreter lock, for at most about ``budget_ms`` in all. It
    changes no affinity. Two processes of one machine that call it choose the same processor: the
    choice falls on the highest-numbered one (the lowest usually takes the interrupts), not on the
    one that happened to be idle in that moment.

    :param cpus: processors to choose from; default: those the calling thread may use.
    :param budget_ms: bound on the measuring time, at least 1.
    :raises ValueError: ``cpus`` empty, negative or not usable by this process; budget below 1.
    """
    allowed = _allowed(cpus)
    if budget_ms < 1:
        raise ValueError(f"budget of {budget_ms} ms")
    if len(allowed) == 1:
        return Placement(allowed, allowed, f"cpu {allowed[0]} is the only one", ())
    return decide(allowed, _measure(allowed, budget_ms))


def decide(allowed: tuple[int, ...], measured: tuple[WakeCost, ...]) -> Placement:
    """The rule alone: what to recommend, given the costs.

    :param allowed: in ascending order, at least two.
    :raises ValueError: a cost on one processor or one across is missing.
    """
    same, cross = _typical(measured, same=True), _typical(measured, same=False)
    if same is None or cross is None:
        raise ValueError("a wake-up cost on one processor and one across are needed")
    costs = f"a wake-up costs {cross / 1000:.1f} us across processors, {same / 1000:.1f} us on one"
    if cross < PIN_RATIO * same:
        return Placement(allowed, allowed, f"{costs}: left to the scheduler", measured)
    reason = f"{costs}: threads that wake each other stay together on cpu {allowed[-1]}"
    return Placement((allowed[-1],), allowed, reason, measured)


def _allowed(cpus: Sequence[int] | None) -> tuple[int, ...]:
    usable = os.sched_getaffinity(0)
    chosen = tuple(sorted(usable if cpus is None else set(cpus)))
    if not chosen:
        raise ValueError("no processors to choose from")
    foreign = [cpu for cpu in chosen if cpu not in usable]
    if foreign:
        raise ValueError(
            f"cpu {foreign[0]} is not among {sorted(usable)}, which this process may use"
        )
    return chosen


def _measure(allowed: tuple[int, ...], budget_ms: int) -> tuple[WakeCost, ...]:
    """The same-processor cost of the candidate, and a few pairs with it, near and far numbers."""
    candidate = allowed[-1]
    others = allowed[:-1]
    step = max(1, len(others) // _PAIRS_MAX)
    pairs = [(candidate, candidate)]
    pairs += [(candidate, other) for other in others[::step][:_PAIRS_MAX]]
    budget_ns = budget_ms * 1_000_000 // len(pairs)
    return tuple(_wake_cost(first, second, budget_ns) for first, second in pairs)


def _wake_cost(first: int, second: int, budget_ns: int) -> WakeCost:
    trips = sorted(
        native.wake_round_trip(
            first, second, rounds=_ROUNDS_MAX, warmup=_WARMUP, budget_ns=budget_ns
        )
    )
    p50, p90 = percentile(trips, 0.5) // 2, percentile(trips, 0.9) // 2
    return WakeCost(first, second, p50, p90, len(trips))


def _typical(measured: Sequence[WakeCost], *, same: bool) -> int | None:
    costs = [cost.p50_ns for cost in measured if cost.is_same is same]
    return int(median(costs)) if costs else None
