"""What a measurement says: typed, frozen, with the unit in every field's name.

A latency is not one number: a run's samples give percentiles, several runs give a spread of each.
Shown is the median of the runs' percentiles, with the least and the most median beside it, because
the spread between runs (who else was on this machine) is usually larger than anything within one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

GIB = 1 << 30


def percentile(ordered: Sequence[int], quantile: float) -> int:
    """The smallest sample that at least ``quantile`` of all samples do not exceed (nearest rank).

    :param ordered: samples in ascending order, at least one.
    :param quantile: 0 < quantile <= 1.
    :raises ValueError: no samples, or a quantile outside its range.
    """
    if not ordered or not 0 < quantile <= 1:
        raise ValueError(f"quantile {quantile} of {len(ordered)} samples")
    return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles in microseconds: per run, then the median over the runs. ``max_us`` is of all."""

    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float
    min_us: float
    p50_us_least: float
    p50_us_most: float
    samples_per_run: int
    runs: int

    @classmethod
    def from_runs(cls, runs: Sequence[Sequence[int]]) -> Latency:
        """Summarise runs of samples in nanoseconds; each run has at least one.

        :raises ValueError: no runs, or a run without samples.
        """
        if not runs:
            raise ValueError("no runs")
        ordered = [sorted(run) for run in runs]

        def typical(quantile: float) -> float:
            return round(median(percentile(run, quantile) for run in ordered) / 1000, 3)

        medians = [percentile(run, 0.5) for run in ordered]
        return cls(
            p50_us=typical(0.5),
            p90_us=typical(0.9),
            p99_us=typical(0.99),
            max_us=round(max(run[-1] for run in ordered) / 1000, 3),
            min_us=round(min(run[0] for run in ordered) / 1000, 3),
            p50_us_least=round(min(medians) / 1000, 3),
            p50_us_most=round(max(medians) / 1000, 3),
            samples_per_run=min(len(run) for run in ordered),
            runs=len(runs),
        )


@dataclass(frozen=True, slots=True)
class Throughput:
    """Bytes per second over several passes, in GB/s (10^9)."""

    gb_per_s: float
    gb_per_s_least: float
    gb_per_s_most: float
    pass_bytes: int
    passes: int

    @classmethod
    def from_passes(cls, durations_ns: Sequence[int], pass_bytes: int) -> Throughput:
        """:raises ValueError: no passes, or one that took no time."""
        if not durations_ns or min(durations_ns) <= 0:
            raise ValueError(f"passes of {list(durations_ns)} ns")
        rates = [pass_bytes / duration for duration in durations_ns]
        return cls(
            gb_per_s=round(median(rates), 3),
            gb_per_s_least=round(min(rates), 3),
            gb_per_s_most=round(max(rates), 3),
            pass_bytes=pass_bytes,
            passes=len(durations_ns),
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """Time per GiB of guest RAM, in milliseconds, over several runs."""

    ms_per_gib: float
    ms_per_gib_least: float
    ms_per_gib_most: float
    runs: int

    @classmethod
    def from_runs(cls, durations_ns: Sequence[int], length: int) -> Cost:
        """:raises ValueError: no runs, or no length."""
        if not durations_ns or length <= 0:
            raise ValueError(f"{len(durations_ns)} runs over {length} bytes")
        costs = [duration / 1e6 * GIB / length for duration in durations_ns]
        return cls(
            ms_per_gib=round(median(costs), 4),
            ms_per_gib_least=round(min(costs), 4),
            ms_per_gib_most=round(max(costs), 4),
            runs=len(costs),
        )


@dataclass(frozen=True, slots=True)
class GuestLatency:
    """What a guest felt at touches of pages it did not have yet; medians over several migrations.

    :ivar touches: such touches in all runs; ``requests`` is how many of the pages were asked for.
    """

    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float
    p50_us_least: float
    p50_us_most: float
    touches: int
    requests: int
    runs: int


@dataclass(frozen=True, slots=True)
class Duration:
    """A time span over several runs."""

    ms: float
    ms_least: float
    ms_most: float
    runs: int

    @classmethod
    def from_runs(cls, durations_ms: Sequence[float]) -> Duration:
        """:raises ValueError: no runs."""
        if not durations_ms:
            raise ValueError("no runs")
        return cls(
            ms=round(median(durations_ms), 3),
            ms_least=round(min(durations_ms), 3),
            ms_most=round(max(durations_ms), 3),
            runs=len(durations_ms),
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of a process at its highest, above that of an idle one with the same guest RAM."""

    above_idle_bytes: int
    idle_bytes: int
    ram_bytes: int
    runs: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why a row has no value here, and what would give it one."""

    reason: str
    remedy: str | None = None


Value = Latency | Throughput | Cost | GuestLatency | Duration | Footprint | Skipped


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row: what was measured, how, where, and what came out.

    :ivar name: what, as an identifier: ``"fault_round_trip"``.
    :ivar parameters: what tells this row from its neighbours: backing, transport, batch_bytes, ...
    :ivar placement: ``"same"``, ``"cross"``, ``"split"``, ``"unpinned"``, ``"chosen"``.
    :ivar cpus: role -> processor (or list of them); empty when unpinned.
    :ivar counts: what proves the path was taken: touches, messages, pages placed, ...
    """

    name: str
    value: Value
    parameters: Mapping[str, str | int] = field(default_factory=dict)
    placement: str = "unpinned"
    cpus: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """False for a row that was skipped."""
        return not isinstance(self.value, Skipped)

    @property
    def key(self) -> str:
        """Name and parameters in one line, for people: ``fault_round_trip anon``."""
        return " ".join([self.name, *(str(value) for value in self.parameters.values())])

    def to_json(self, record: str) -> dict[str, Any]:
        """One flat-enough object for ``--json``; ``record`` names its kind."""
        head: dict[str, Any] = {"record": record, "name": self.name, **self.parameters}
        head |= {"placement": self.placement, "cpus": dict(self.cpus)}
        if isinstance(self.value, Skipped):
            head |= {"skipped": self.value.reason, "remedy": self.value.remedy}
        else:
            head |= asdict(self.value)
        return head | {"counts": dict(self.counts)} if self.counts else head
