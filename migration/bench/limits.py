"""The machine's own limits: which rows are measured, with how much effort, on which processors."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from guestmem.geometry import TARGET_PAGE_BYTES

from . import native
from .jobs import Job, jobs_of_one_run, run_all
from .machine import Processors
from .native import UNPINNED, Backing, FaultConfig, PlaceOp, Transport
from .peer import page_server
from .results import Latency, Measurement, Throughput
from .trackers import tracker_jobs

KIB, MIB = 1 << 10, 1 << 20
REQUEST_BYTES = 16
REPLY_BYTES = REQUEST_BYTES + TARGET_PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to look. Sizes in bytes; ``is_full`` adds the rows that matter to few."""

    runs: int
    touches: int
    rounds: int
    bulk_bytes: int
    place_bytes: int
    hugetlb_bytes: int
    scan_bytes: int
    is_full: bool = False


QUICK = Effort(3, 400, 400, 16 * MIB, 16 * MIB, 8 * MIB, 64 * MIB)
NORMAL = Effort(5, 1500, 1500, 64 * MIB, 64 * MIB, 32 * MIB, 256 * MIB)
FULL = Effort(7, 5000, 5000, 256 * MIB, 256 * MIB, 64 * MIB, 1024 * MIB, is_full=True)

Roles = Mapping[str, int]


def placements(processors: Processors, *, remote: bool = False) -> Iterator[tuple[str, Roles]]:
    """Placement names and who sits where. "split" gives each end of a remote fault a processor."""
    near, far = processors.near, processors.far
    local = ("toucher", "handler", "listen") if remote else ("toucher", "handler")
    roles = (*local, "peer") if remote else local
    yield "same", dict.fromkeys(roles, near)
    if far is not None:
        if remote:
            yield "split", {**dict.fromkeys(local, near), "peer": far}
            yield "cross", {"toucher": near, "handler": far, "listen": far, "peer": near}
        else:
            yield "cross", {"toucher": near, "handler": far}
    yield "unpinned", {}


def _pairs(processors: Processors) -> Iterator[tuple[str, int, int]]:
    yield "same", processors.near, processors.near
    if processors.far is not None:
        yield "cross", processors.near, processors.far


class LimitPlan:
    """Builds the jobs. Peer processes live as long as the plan's ``with`` block."""

    def __init__(
        self, processors: Processors, effort: Effort, transports: Sequence[Transport]
    ) -> None:
        self._processors = processors
        self._effort = effort
        self._transports = transports
        self._stack = ExitStack()

    def __enter__(self) -> LimitPlan:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def jobs(self) -> list[Job]:
        """Every row, in the order they are shown."""
        return [
            *self._wakes(),
            *self._socket_round_trips(),
            *self._local_faults(),
            *self._remote_faults(),
            *self._placing(),
            *self._socket_bulk(),
            *self._push_paths(),
            *self._scans(),
            *tracker_jobs(self._effort.scan_bytes, self._effort.runs),
        ]

    def _wakes(self) -> Iterator[Job]:
        for name, first, second in _pairs(self._processors):
            yield Job(
                "wake_round_trip",
                partial(native.wake_round_trip, first, second, rounds=self._effort.rounds),
                Latency.from_runs,
                self._effort.runs,
                placement=name,
                cpus={"first": first, "second": second},
            )

    def _socket_round_trips(self) -> Iterator[Job]:
        for transport in self._transports:
            for request, reply in ((1, 1), (REQUEST_BYTES, REPLY_BYTES)):
                for name, client, server in _pairs(self._processors):
                    yield Job(
                        "socket_round_trip",
                        partial(
                            native.socket_round_trip,
                            transport,
                            request_bytes=request,
                            reply_bytes=reply,
                            client_cpu=client,
                            server_cpu=server,
                            rounds=self._effort.rounds,
                        ),
                        Latency.from_runs,
                        self._effort.runs,
                        {
                            "transport": transport.name.lower(),
                            "request_bytes": request,
                            "reply_bytes": reply,
                        },
                        name,
                        {"client": client, "server": server},
                    )

    def _local_faults(self) -> Iterator[Job]:
        for backing in Backing:
            for name, roles in placements(self._processors):
                config = self._fault_config(backing, roles)
                yield _fault_job("fault_round_trip", config, self._effort.runs, name, roles)
        if self._effort.is_full:
            for name, roles in placements(self._processors):
                if name == "cross":
                    config = self._fault_config(Backing.ANON, roles, spins=True)
                    yield _fault_job("fault_round_trip", config, self._effort.runs, name, roles)

    def _fault_config(self, backing: Backing, roles: Roles, *, spins: bool = False) -> FaultConfig:
        huge = backing is Backing.HUGETLB
        pages = self._effort.hugetlb_bytes // backing.page_bytes if huge else 1024
        return FaultConfig(
            backing=backing,
            region_pages=pages,
            warmup=pages if huge else 200,
            touches=max(32, self._effort.touches // 50) if huge else self._effort.touches,
            toucher_cpu=roles.get("toucher", UNPINNED),
            handler_cpu=roles.get("handler", UNPINNED),
            listen_cpu=roles.get("listen", UNPINNED),
            peer_cpu=roles.get("peer", UNPINNED),
            handler_spins=spins,
        )

    def _remote_faults(self) -> Iterator[Job]:
        for transport in self._transports:
            for name, roles in placements(self._processors, remote=True):
                config = dataclasses.replace(
                    self._fault_config(Backing.ANON, roles), transport=transport
                )
                yield self._remote_job(config, name, roles)
                if self._effort.is_full and name in ("split", "cross"):
                    spinning = dataclasses.replace(config, handler_spins=True)
                    yield self._remote_job(spinning, name, roles)

    def _remote_job(self, config: FaultConfig, placement: str, roles: Roles) -> Job:
        peer: list[int] = []

        def measure(config: FaultConfig) -> native.FaultRun:
            if not peer:  # the first run starts the peer process, the later ones reuse it
                near = self._stack.enter_context(
                    page_server(
                        config.transport,
                        page_bytes=config.backing.page_bytes,
                        pages=config.region_pages,
                        cpu=config.peer_cpu,
                    )
                )
                peer.append(near.fileno())
            return native.remote_fault(config, peer[0])

        return _fault_job(
            "remote_fault_floor", config, self._effort.runs, placement, roles, measure
        )

    def _placing(self) -> Iterator[Job]:
        small = (4 * KIB, 64 * KIB, 2 * MIB)
        rows = [(op, backing, batch) for op in PlaceOp for backing in Backing for batch in small]
        for op, backing, batch in rows:
            if backing is Backing.HUGETLB and (
                batch < backing.page_bytes or op is PlaceOp.ZEROPAGE
            ):
                continue  # hugetlb knows no ZEROPAGE, and COPY takes whole huge pages only
            if op is PlaceOp.MEMCPY and (batch != 2 * MIB or backing is Backing.SHMEM):
                continue
            huge = backing is Backing.HUGETLB
            yield self._placing_job(
                op, backing, batch, self._effort.hugetlb_bytes if huge else self._effort.place_bytes
            )

    def _placing_job(self, op: PlaceOp, backing: Backing, batch: int, length: int) -> Job:
        cpu = self._processors.near
        return Job(
            f"{op.name.lower()}_bulk",
            partial(native.place, backing, op, batch_bytes=batch, length=length, passes=1, cpu=cpu),
            partial(_throughput, length),
            self._effort.runs,
            {"backing": backing.name.lower(), "batch_bytes": batch},
            "same",
            {"placer": cpu},
        )

    def _socket_bulk(self) -> Iterator[Job]:
        for transport in self._transports:
            for write in (4 * KIB, 64 * KIB, MIB):
                for name, sender, receiver in _pairs(self._processors):
                    yield Job(
                        "socket_bulk",
                        partial(
                            native.socket_bulk,
                            transport,
                            write_bytes=write,
                            pass_bytes=self._effort.bulk_bytes,
                            passes=1,
                            sender_cpu=sender,
                            receiver_cpu=receiver,
                        ),
                        partial(_throughput, self._effort.bulk_bytes),
                        self._effort.runs,
                        {"transport": transport.name.lower(), "write_bytes": write},
                        name,
                        {"sender": sender, "receiver": receiver},
                    )

    def _push_paths(self) -> Iterator[Job]:
        rows = [*_pairs(self._processors), ("unpinned", UNPINNED, UNPINNED)]
        backings = (Backing.ANON, Backing.SHMEM) if self._effort.is_full else (Backing.ANON,)
        for transport in self._transports:
            for backing in backings:
                for name, sender, receiver in rows:
                    pinned = name != "unpinned"
                    yield Job(
                        "push_path",
                        partial(
                            native.push,
                            transport,
                            backing,
                            length=self._effort.bulk_bytes,
                            passes=1,
                            sender_cpu=sender,
                            receiver_cpu=receiver,
                        ),
                        partial(_throughput, self._effort.bulk_bytes),
                        self._effort.runs,
                        {"transport": transport.name.lower(), "backing": backing.name.lower()},
                        name,
                        {"sender": sender, "receiver": receiver} if pinned else {},
                    )

    def _scans(self) -> Iterator[Job]:
        backings = Backing if self._effort.is_full else (Backing.ANON, Backing.SHMEM)
        for backing in backings:
            huge = backing is Backing.HUGETLB
            length = self._effort.hugetlb_bytes if huge else self._effort.scan_bytes
            yield from _scan_jobs(backing, length, self._processors.near, self._effort.runs)


def _throughput(pass_bytes: int, runs: Sequence[Sequence[int]]) -> Throughput:
    return Throughput.from_passes([duration for run in runs for duration in run], pass_bytes)


def _fault_job(
    name: str,
    config: FaultConfig,
    runs: int,
    placement: str,
    roles: Roles,
    measure: Callable[[FaultConfig], native.FaultRun] = native.fault_round_trip,
) -> Job:
    parameters: dict[str, str | int] = {"backing": config.backing.name.lower()}
    if name == "remote_fault_floor":
        parameters = {"transport": config.transport.name.lower(), **parameters}
    if config.handler_spins:
        parameters["handler"] = "spinning"

    def sample() -> Sequence[int]:
        run = measure(config)
        if run.wrong or run.messages < run.touches:
            # Fewer messages than touches: a page was there already, and the sample is no fault.
            raise OSError(errno.EBADMSG, f"{os.strerror(errno.EBADMSG)}: {run.counts}")
        job.count(run.counts)
        return run.samples_ns

    job = Job(name, sample, Latency.from_runs, runs, parameters, placement, roles)
    return job


def _scan_jobs(backing: Backing, length: int, cpu: int, runs: int) -> Iterator[Job]:
    def measure() -> native.ScanRun:
        run = native.pagemap_scan(backing, length=length, cpu=cpu)
        if run.clean_pages or run.dirty_pages * TARGET_PAGE_BYTES != length:
            raise OSError(errno.EBADMSG, f"{os.strerror(errno.EBADMSG)}: {run}")
        return run

    yield from jobs_of_one_run(
        measure,
        _SCAN_FIGURES,
        length,
        runs,
        prefix="pagemap_",
        parameters={"backing": backing.name.lower()},
        placement="same",
        cpus={"scanner": cpu},
    )


_SCAN_FIGURES: Mapping[str, Callable[[native.ScanRun], int]] = {
    "scan_clean": lambda run: run.clean_ns,
    "scan_written": lambda run: run.dirty_get_ns,
    "scan_written_and_protect": lambda run: run.dirty_protect_ns,
    "first_write": lambda run: run.write_ns,
}


def measure_limits(
    processors: Processors,
    effort: Effort = NORMAL,
    transports: Sequence[Transport] = tuple(Transport),
    advance: Callable[[Job, int], None] = lambda job, total: None,
) -> list[Measurement]:
    """Measure every row. Takes about 5 s (quick), 20 s (normal), 2 minutes (full).

    :param advance: called before each single run with its job and the number of runs in all.
    """
    with LimitPlan(processors, effort, transports) as plan:
        jobs = plan.jobs()
        total = sum(job.runs for job in jobs)
        return list(run_all(jobs, lambda job: advance(job, total)))
