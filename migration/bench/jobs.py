"""Measurements as jobs that take turns.

All first runs go before all second runs: when somebody else's work slows the machine for a second,
it hits one run of many rows, not all runs of one, and the median over the runs shrugs it off.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from .results import Cost, Latency, Measurement, Skipped, Throughput

Run = TypeVar("Run")
Sample = Callable[[], Sequence[int]]
Summary = Callable[[Sequence[Sequence[int]]], Latency | Throughput | Cost]

_USERFAULTFD_REMEDY = "run as root, or: sysctl vm.unprivileged_userfaultfd=1"
_HUGEPAGES_REMEDY = "postcopy hugepages reserve 64"


@dataclass
class Job:
    """One row in the making.

    :ivar sample: does one run and returns its durations in nanoseconds.
    :ivar summarise: turns all runs into the row's value.
    :ivar counts: filled by ``sample``: what proves that the path was taken.
    """

    name: str
    sample: Sample
    summarise: Summary
    runs: int
    parameters: Mapping[str, str | int] = field(default_factory=dict)
    placement: str = "unpinned"
    cpus: Mapping[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    taken: list[Sequence[int]] = field(default_factory=list)
    skipped: Skipped | None = None

    def run_once(self) -> None:
        """One more run, unless all are done or the row cannot be measured here."""
        if self.skipped is not None or len(self.taken) >= self.runs:
            return
        try:
            self.taken.append(self.sample())
        except OSError as error:
            self.skipped = why_skipped(error)

    def count(self, counts: Mapping[str, int]) -> None:
        """Add one run's counts."""
        for name, value in counts.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def result(self) -> Measurement:
        """The finished row."""
        return Measurement(
            name=self.name,
            value=self.skipped or self.summarise(self.taken),
            parameters=self.parameters,
            placement=self.placement,
            cpus=self.cpus,
            counts=dict(self.counts),
        )


def jobs_of_one_run(
    measure: Callable[[], Run],
    figures: Mapping[str, Callable[[Run], int]],
    length: int,
    runs: int,
    *,
    prefix: str,
    parameters: Mapping[str, str | int],
    placement: str = "unpinned",
    cpus: Mapping[str, int] | None = None,
) -> Iterator[Job]:
    """Several costs out of the same runs: the first row's job measures, the others read what it
    saw.

    :param figures: row name, without ``prefix`` -> its nanoseconds in a run.
    :param length: bytes of guest RAM that a run goes over.
    """
    taken: list[Run] = []
    first = next(iter(figures))

    def sample(name: str) -> Sequence[int]:
        if name == first:
            taken.append(measure())
        if not taken:
            what = " ".join(str(value) for value in parameters.values())
            raise OSError(errno.ENODATA, f"{what}: see {prefix}{first}")
        return [figures[name](taken[-1])]

    for name in figures:
        yield Job(
            f"{prefix}{name}",
            partial(sample, name),
            lambda all_runs: Cost.from_runs([run[0] for run in all_runs], length),
            runs,
            parameters,
            placement,
            cpus or {},
        )


def why_skipped(error: OSError) -> Skipped:
    """The reason a row has no value, with the remedy where there is one."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return Skipped(str(error), _USERFAULTFD_REMEDY)
    if error.errno == errno.ENOMEM:
        return Skipped(str(error), _HUGEPAGES_REMEDY)
    if error.errno == errno.ENOSYS:
        return Skipped(str(error), "a kernel with CONFIG_USERFAULTFD=y")
    return Skipped(str(error))


def run_all(
    jobs: Sequence[Job], advance: Callable[[Job], None] = lambda job: None
) -> Iterable[Measurement]:
    """Run the jobs in turns, then give the finished rows in order.

    :param advance: called before each single run, for a progress display.
    """
    for _ in range(max((job.runs for job in jobs), default=0)):
        for job in jobs:
            advance(job)
            job.run_once()
    return [job.result() for job in jobs]
