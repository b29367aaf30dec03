"""What was reached against what this machine can do, as ratios taken within one run.

A ratio is ``reached / limit``: for a latency or a footprint 1 is perfect and more is worse, for a
throughput 1 is perfect and less is worse. Aims are the project's own; nothing fails on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .results import Duration, Footprint, GuestLatency, Latency, Measurement, Throughput

IDLE_P50_AIM = 1.5
PUSH_P99_AIM = 4.0
PUSH_THROUGHPUT_AIM = 0.7
DOWNTIME_AIM_MS = 5.0
FOOTPRINT_AIM = 0.01


@dataclass(frozen=True, slots=True)
class Comparison:
    """One ratio with the two figures it is made of.

    :ivar limit_name: which row, or which fixed aim, stands behind ``limit``.
    :ivar aim: the ratio to reach; ``is_ceiling`` says whether it must be at most or at least that.
    """

    name: str
    case: str
    unit: str
    reached: float
    limit_name: str
    limit: float
    aim: float
    is_ceiling: bool = True

    @property
    def ratio(self) -> float:
        """``reached / limit``."""
        return round(self.reached / self.limit, 4) if self.limit else float("inf")

    @property
    def is_met(self) -> bool:
        """The aim is reached."""
        return self.ratio <= self.aim if self.is_ceiling else self.ratio >= self.aim

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        fields = asdict(self)
        unit, ceiling = fields.pop("unit"), fields.pop("is_ceiling")
        fields[f"reached_{unit}"] = fields.pop("reached")
        fields[f"limit_{unit}"] = fields.pop("limit")
        aim = fields.pop("aim")
        bound = {"ratio_aim_most" if ceiling else "ratio_aim_least": aim}
        return {"record": "comparison", **fields, "ratio": self.ratio, **bound, "met": self.is_met}


def _find(
    rows: Iterable[Measurement], name: str, placement: str | None = None, **parameters: str | int
) -> Iterator[Measurement]:
    for row in rows:
        if row.name != name or not row.is_measured or "handler" in row.parameters:
            continue
        if placement is not None and row.placement != placement:
            continue
        if all(row.parameters.get(key) == value for key, value in parameters.items()):
            yield row


def _case(row: Measurement) -> str:
    return f"{row.parameters.get('transport', '')}, {row.placement}"


def compare(limits: Sequence[Measurement], runtime: Sequence[Measurement]) -> list[Comparison]:
    """Every ratio for which both sides were measured."""
    return [
        *_fault_latencies(limits, runtime),
        *_push(limits, runtime),
        *_downtimes(runtime),
        *_footprints(runtime),
    ]


def _fault_latencies(
    limits: Sequence[Measurement], runtime: Sequence[Measurement]
) -> Iterator[Comparison]:
    for row in _find(runtime, "guest_fault_idle_stream"):
        assert isinstance(row.value, GuestLatency)
        transport = row.parameters["transport"]
        for floor in _find(limits, "remote_fault_floor", row.placement, transport=transport):
            assert isinstance(floor.value, Latency)
            name, limit = "floor of one remote fault, p50", floor.value.p50_us
            yield Comparison(
                "idle_stream_fault_p50",
                _case(row),
                "us",
                row.value.p50_us,
                name,
                limit,
                IDLE_P50_AIM,
            )
    for row in _find(runtime, "guest_fault_under_push"):
        assert isinstance(row.value, GuestLatency)
        yield Comparison(
            "under_push_fault_p99",
            _case(row),
            "us",
            row.value.p99_us,
            "its own p50",
            row.value.p50_us,
            PUSH_P99_AIM,
        )


def _best(rows: Iterable[Measurement]) -> float:
    values = (row.value for row in rows)
    return max((v.gb_per_s for v in values if isinstance(v, Throughput)), default=0.0)


def _push(limits: Sequence[Measurement], runtime: Sequence[Measurement]) -> Iterator[Comparison]:
    for row in _find(runtime, "push"):
        assert isinstance(row.value, Throughput)
        transport, backing = row.parameters["transport"], row.parameters["backing"]
        # Two processors move data at once in any placement but "same"; the machine's best counts.
        where = "same" if row.placement == "same" else None
        socket = _best(_find(limits, "socket_bulk", where, transport=transport))
        copy = _best(_find(limits, "copy_bulk", backing=backing))
        if socket and copy:
            slower = "UFFDIO_COPY in bulk" if copy < socket else "socket in bulk"
            yield Comparison(
                "push_throughput",
                _case(row),
                "gb_per_s",
                row.value.gb_per_s,
                f"slower of socket and UFFDIO_COPY: {slower}",
                min(socket, copy),
                PUSH_THROUGHPUT_AIM,
                is_ceiling=False,
            )
        path = _best(_find(limits, "push_path", where, transport=transport, backing=backing))
        if path:
            yield Comparison(
                "push_throughput_as_one_path",
                _case(row),
                "gb_per_s",
                row.value.gb_per_s,
                "socket and one COPY a page, both at once",
                path,
                PUSH_THROUGHPUT_AIM,
                is_ceiling=False,
            )


def _downtimes(runtime: Sequence[Measurement]) -> Iterator[Comparison]:
    for row in _find(runtime, "downtime"):
        assert isinstance(row.value, Duration)
        case = f"{_case(row)}, {row.parameters['guest']}"
        aim = "5 ms at 1 GiB"
        yield Comparison("downtime", case, "ms", row.value.ms, aim, DOWNTIME_AIM_MS, 1.0)


def _footprints(runtime: Sequence[Measurement]) -> Iterator[Comparison]:
    for row in _find(runtime, "destination_memory"):
        assert isinstance(row.value, Footprint)
        yield Comparison(
            "destination_memory_above_idle",
            _case(row),
            "bytes",
            row.value.above_idle_bytes,
            "guest RAM",
            row.value.ram_bytes,
            FOOTPRINT_AIM,
        )
