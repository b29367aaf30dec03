"""The runtime measured from outside: pairs of ``postcopy run`` on this machine, driven through QMP.

What a guest feels is counted by the guest itself (the toy VM times its touches of pages it does not
have yet); what moves is counted by the source; memory is what the kernel says of the process.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from guestmem.geometry import TARGET_PAGE_BYTES

from .machine import Processors
from .qemu import MigrationFigures, figures, migrate, start_migration
from .results import Duration, Footprint, GuestLatency, Measurement, Skipped, Throughput
from .vm import VM, BenchError

Advance = Callable[[str, int], None]

# Few pages, often: its pauses are known to 50 us, and it asks for next to nothing.
IDLE_GUEST = ("--working-set", "64K", "--rate", "20000", "--write-share", "0")
# Every touch of a page not yet there is a sample; nothing is written, so nothing is sent twice.
READING_GUEST = ("--workload", "random", "--write-share", "0")
# Faster than any link: at the switchover all of RAM has to go again.
WRITING_GUEST = ("--workload", "seq", "--write-share", "1")
FAILED = Skipped("every run failed; the errors say why")
MULTIFD_CHANNELS = (1, 2, 4)
_POLL_S = 0.05
# Next to nothing: the switch to postcopy must come before a small guest is copied.
PRECOPY_BANDWIDTH = 4 << 20
_HOLD_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class RuntimeEffort:
    """How often and with how much RAM; ``is_full`` adds the "split" placement and precopy.

    :ivar idle_touches: touches of missing pages to wait for while the background push is held.
    """

    runs: int
    ram_bytes: int
    idle_touches: int
    is_full: bool = False

    def with_ram(self, ram_bytes: int | None) -> RuntimeEffort:
        """The same with another RAM size; ``None`` keeps this one."""
        return self if ram_bytes is None else dataclasses.replace(self, ram_bytes=ram_bytes)


@dataclass(frozen=True, slots=True)
class Place:
    """A placement of whole processes; ``None`` leaves them all they may use."""

    name: str
    source_cpus: tuple[int, ...] | None
    destination_cpus: tuple[int, ...] | None

    @property
    def roles(self) -> Mapping[str, int]:
        """For the row, when both are pinned."""
        if self.source_cpus is None or self.destination_cpus is None:
            return {}
        return {"destination": self.destination_cpus[0], "source": self.source_cpus[0]}


def places(processors: Processors, *, is_full: bool) -> list[Place]:
    """ "same" and "chosen"; "split" with full effort, where there are two processors."""
    near, far = (processors.near,), processors.far
    found = [Place("same", near, near)]
    if is_full and far is not None:
        found.append(Place("split", (far,), near))
    return [*found, Place("chosen", None, None)]


@dataclass(frozen=True, slots=True)
class RuntimeResult:
    """Rows, whole migrations, and what could not be measured, in the VMs' own words."""

    rows: Sequence[Measurement]
    migrations: Sequence[MigrationFigures]
    failures: Sequence[str]


def run_argv(ram_bytes: int, guest: Sequence[str], qmp: Path, *, incoming: bool) -> list[str]:
    """The command line of one VM."""
    argv = [sys.executable, "-m", "migration", "run", "-m", f"{ram_bytes}B", *guest]
    argv += ["--qmp", f"unix:{qmp}", "--run-with", "exit-with-parent=on"]
    return [*argv, "--incoming", "defer"] if incoming else argv


@contextmanager
def vm_pair(ram_bytes: int, guest: Sequence[str], place: Place) -> Iterator[tuple[VM, VM]]:
    """A source whose guest runs, and a destination that waits to be told where."""

    def argv(incoming: bool) -> Callable[[Path], list[str]]:
        return lambda qmp: run_argv(ram_bytes, guest, qmp, incoming=incoming)

    with (
        VM("source", ram_bytes, argv(False), place.source_cpus) as source,
        VM("destination", ram_bytes, argv(True), place.destination_cpus) as destination,
        blaming_both(source, destination),
    ):
        yield source, destination


@contextmanager
def blaming_both(source: VM, destination: VM) -> Iterator[None]:
    """An error tells what both sides said: the cause is often with the one that did not fail."""
    try:
        yield
    except BenchError as error:
        logs = "".join(f"\n{vm.name}: {vm.account()}" for vm in (source, destination))
        raise BenchError(f"{error}{logs}") from error


@dataclass
class GuestRuns:
    """What guests reported, run by run."""

    stats: list[Mapping[str, Any]] = field(default_factory=list)
    requests: int = 0

    def add(self, source: VM, destination: VM) -> None:
        """Ask a pair that is in postcopy or past it.

        :raises BenchError: the guest met a wrong page, or no missing one at all.
        """
        machine = destination.execute("x-query-machine")
        if machine["touch_errors"] or machine["lost_vcpus"]:
            raise BenchError(f"the guest found damaged memory: {machine}")
        requests = int(source.execute("query-migrate")["ram"]["postcopy-requests"])
        if not machine["misses"] or not requests:
            raise BenchError(f"no page was missing when it was touched: {machine}")
        self.stats.append(machine)
        self.requests += requests

    def latency(self) -> GuestLatency:
        """The row's value: medians of the runs' percentiles."""
        felt = [run["fault_latency_us"] for run in self.stats]
        p50 = [float(one["p50"]) for one in felt]
        return GuestLatency(
            p50_us=round(median(p50), 3),
            p90_us=round(median(float(one["p90"]) for one in felt), 3),
            p99_us=round(median(float(one["p99"]) for one in felt), 3),
            max_us=round(max(float(one["max"]) for one in felt), 3),
            p50_us_least=round(min(p50), 3),
            p50_us_most=round(max(p50), 3),
            touches=sum(int(run["misses"]) for run in self.stats),
            requests=self.requests,
            runs=len(felt),
        )


class RuntimeBench:
    """All scenarios for one transport, in turns: run 1 of each, then run 2 of each."""

    def __init__(self, transport: str, found: Sequence[Place], effort: RuntimeEffort) -> None:
        self._transport = transport
        self._at_once: dict[str, Any] = {
            "kind": "postcopy",
            "transport": transport,
            "precopy_bandwidth": PRECOPY_BANDWIDTH,
        }
        self._effort = effort
        self._places = found
        self._chosen = found[-1]
        self._idle_stream = {place.name: GuestRuns() for place in found}
        self._under_push = {place.name: GuestRuns() for place in found}
        self._pushes: dict[str, list[tuple[int, int]]] = {place.name: [] for place in found}
        self._pauses: dict[str, list[float]] = {"idle": [], "all of RAM redirtied": []}
        self._redirtied_pages = 0
        self._memory: list[tuple[int, int]] = []
        self.failures: list[str] = []
        self._answers: dict[str, list[Mapping[str, Any]]] = {"postcopy": [], "precopy": []}
        self._precopies: dict[int, list[Mapping[str, Any]]] = {n: [] for n in MULTIFD_CHANNELS}

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """Everything one turn does, with a name for the progress line."""
        found: list[tuple[str, Callable[[], None]]] = []
        for place in self._places:
            found += [
                (f"faults, idle stream, {place.name}", partial(self._hold, place)),
                (f"faults under push, {place.name}", partial(self._push_and_fault, place)),
                (f"push, {place.name}", partial(self._push, place)),
            ]
        found.append(("downtime, RAM redirtied", self._redirty))
        if self._effort.is_full:
            found.append(("precopy", self._precopy))
            found += [
                (f"precopy over {count} channels", partial(self._precopy_multifd, count))
                for count in MULTIFD_CHANNELS
            ]
        return found

    def take(self, text: str, step: Callable[[], None]) -> None:
        """Do one step; what fails is noted and costs its own row only."""
        try:
            step()
        except BenchError as error:
            self.failures.append(f"{text} over {self._transport}: {error}")

    def _hold(self, place: Place) -> None:
        """Only what the guest asks for moves, until it has asked often enough."""
        with vm_pair(self._effort.ram_bytes, READING_GUEST, place) as (source, destination):
            source.execute("migrate-set-parameters", {"x-hold-background": True})
            with start_migration(
                source,
                destination,
                kind="postcopy",
                transport=self._transport,
                precopy_bandwidth=PRECOPY_BANDWIDTH,
            ):
                destination.wait_status("postcopy-active")
                _wait_misses(destination, self._effort.idle_touches)
                self._idle_stream[place.name].add(source, destination)
                source.execute("migrate-set-parameters", {"x-hold-background": False})
                source.wait_status("completed")

    def _push_and_fault(self, place: Place) -> None:
        with vm_pair(self._effort.ram_bytes, READING_GUEST, place) as (source, destination):
            migrate(source, destination, **self._at_once)
            self._under_push[place.name].add(source, destination)

    def _push(self, place: Place) -> None:
        with vm_pair(self._effort.ram_bytes, IDLE_GUEST, place) as (source, destination):
            source.execute("query-status")  # it is up: its RAM is filled
            before = source.memory_bytes()
            answer = migrate(source, destination, **self._at_once)
            times = source.status_times_s
            duration_ns = int((times["completed"] - times["postcopy-active"]) * 1e9)
            pushed = int(answer["x-postcopy"]["postcopy-pages"]) * TARGET_PAGE_BYTES
            self._pushes[place.name].append((pushed, duration_ns))
            if place is self._chosen:
                self._memory.append((destination.memory_bytes(peak=True), before))
                self._answers["postcopy"].append(answer)
                self._pauses["idle"].append(_downtime_ms(destination))

    def _redirty(self) -> None:
        """One full pass, then the switchover with every page dirty again."""
        ram_bytes = self._effort.ram_bytes
        with (
            vm_pair(ram_bytes, WRITING_GUEST, self._chosen) as (source, destination),
            start_migration(source, destination, kind="precopy-first", transport=self._transport),
        ):
            source.wait_event("MIGRATION_PASS", lambda data: data["pass"] >= 2)
            source.execute("migrate-start-postcopy")
            source.wait_status("completed")
            destination.wait_status("completed")
            pages = source.execute("query-migrate")["x-postcopy"]["postcopy-pages"]
            self._redirtied_pages += int(pages)
            self._pauses["all of RAM redirtied"].append(_downtime_ms(destination))

    def _precopy(self) -> None:
        with vm_pair(self._effort.ram_bytes, IDLE_GUEST, self._chosen) as (source, destination):
            answer = migrate(source, destination, kind="precopy", transport=self._transport)
            self._answers["precopy"].append(answer)

    def _precopy_multifd(self, count: int) -> None:
        with vm_pair(self._effort.ram_bytes, IDLE_GUEST, self._chosen) as (source, destination):
            answer = migrate(
                source,
                destination,
                kind="precopy",
                transport=self._transport,
                multifd_channels=count,
            )
            self._precopies[count].append(answer)

    def rows(self) -> Iterator[Measurement]:
        """What the turns found; a row without a single run is there too, as not measured."""
        parameters: dict[str, str | int] = {"transport": self._transport, "backing": "anon"}
        for place in self._places:
            here: dict[str, Any] = {"placement": place.name, "cpus": place.roles}
            for name, runs in (
                ("guest_fault_idle_stream", self._idle_stream[place.name]),
                ("guest_fault_under_push", self._under_push[place.name]),
            ):
                yield Measurement(
                    name, runs.latency() if runs.stats else FAILED, parameters, **here
                )
            yield Measurement("push", self._throughput(place), parameters, **here)
        for guest, pauses in self._pauses.items():
            counts = {"postcopy_pages": self._redirtied_pages} if guest != "idle" else {}
            yield Measurement(
                "downtime",
                Duration.from_runs(pauses) if pauses else FAILED,
                {**parameters, "guest": guest, "ram_bytes": self._effort.ram_bytes},
                self._chosen.name,
                counts=counts,
            )
        yield Measurement("destination_memory", self._footprint(), parameters, self._chosen.name)
        if self._effort.is_full:
            yield from self._precopy_rows(parameters)

    def _precopy_rows(self, parameters: Mapping[str, str | int]) -> Iterator[Measurement]:
        """What multifd channels make of a precopy; 0 is the main channel alone."""
        for count, answers in ({0: self._answers["precopy"]} | self._precopies).items():
            sizes = [float(answer["ram"]["transferred"]) for answer in answers]
            spans_ns = [max(1.0, float(answer["total-time"])) * 1e6 for answer in answers]
            yield Measurement(
                "precopy",
                _rate(sizes, spans_ns) if answers else FAILED,
                {**parameters, "multifd_channels": count},
                self._chosen.name,
            )

    def _footprint(self) -> Footprint | Skipped:
        if not self._memory:
            return FAILED
        return Footprint(
            above_idle_bytes=int(median(peak - idle for peak, idle in self._memory)),
            idle_bytes=int(median(idle for _, idle in self._memory)),
            ram_bytes=self._effort.ram_bytes,
            runs=len(self._memory),
        )

    def _throughput(self, place: Place) -> Throughput | Skipped:
        pushes = self._pushes[place.name]
        if not pushes:
            return FAILED
        return _rate([pushed for pushed, _ in pushes], [duration for _, duration in pushes])

    def migrations(self) -> Iterator[MigrationFigures]:
        """Whole migrations of the idle guest, for the table beside QEMU's."""
        for kind, answers in self._answers.items():
            if answers:
                yield figures("postcopy", kind, self._transport, self._effort.ram_bytes, answers)


def _rate(sizes: Sequence[float], spans_ns: Sequence[float]) -> Throughput:
    """Of several equal runs: bytes a nanosecond are GB a second."""
    rates = [size / span for size, span in zip(sizes, spans_ns, strict=True)]
    return Throughput(
        gb_per_s=round(median(rates), 3),
        gb_per_s_least=round(min(rates), 3),
        gb_per_s_most=round(max(rates), 3),
        pass_bytes=int(median(sizes)),
        passes=len(sizes),
    )


def _wait_misses(destination: VM, wanted: int) -> None:
    """Until the guest has touched that many missing pages; nobody announces that, so it is asked.

    Seldom: the question itself wakes threads of the process that is measured.
    """
    deadline = time.monotonic() + _HOLD_TIMEOUT_S
    while int(destination.execute("x-query-machine")["misses"]) < wanted:
        if time.monotonic() > deadline:
            raise BenchError(f"fewer than {wanted} missing pages touched: {destination.log()}")
        time.sleep(_POLL_S)


def _downtime_ms(destination: VM) -> float:
    """By the guest's clock: its last operation there to its first one here."""
    pause = destination.execute("x-query-machine")["downtime_ms"]
    if pause is None:
        raise BenchError(f"the guest did nothing at the destination: {destination.log()}")
    return float(pause)


def measure_runtime(
    processors: Processors,
    effort: RuntimeEffort,
    transports: Sequence[str],
    advance: Advance = lambda text, total: None,
) -> RuntimeResult:
    """Measure every scenario over every transport; one that fails does not stop the others."""
    found = places(processors, is_full=effort.is_full)
    benches = [RuntimeBench(transport, found, effort) for transport in transports]
    turns = [(bench, text, step) for bench in benches for text, step in bench.steps()]
    for _ in range(effort.runs):
        for bench, text, step in turns:
            advance(f"runtime: {text}", effort.runs * len(turns))
            bench.take(text, step)
    return RuntimeResult(
        [row for bench in benches for row in bench.rows()],
        [row for bench in benches for row in bench.migrations()],
        [failure for bench in benches for failure in bench.failures],
    )
