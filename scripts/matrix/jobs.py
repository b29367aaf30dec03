"""One kernel, or two that are connected: fetched, booted, kept as results.

Whatever goes wrong with one kernel stays with it: it is noted in its outcome, the others go on.
"""

import hashlib
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from scripts.matrix import debian, image, runs, vm
from scripts.matrix.debian import FetchError, Kernel
from scripts.matrix.runs import CROSSINGS, Outcome

_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_MACS = ("52:54:00:77:00:01", "52:54:00:77:00:02")
_LISTENING_S = 60.0
_print = threading.Lock()

Plan = Mapping[str, object]


def say(text: str) -> None:
    """A whole line, from any thread."""
    with _print:
        print(text, flush=True)


@dataclass(frozen=True)
class Settings:
    """What all jobs have in common. ``fresh``: boot again what was booted with the same files."""

    cache: Path
    results: Path
    memory_mib: int
    cpus: int
    limits: vm.Limits = field(default_factory=vm.Limits)
    refresh: bool = False
    fresh: bool = False
    nodes: int = 1


@dataclass
class _Job:
    """One VM to be."""

    kernel: Kernel
    initramfs: Path
    folder: Path
    outcome: Outcome
    link: vm.Link | None = None


def one(series: str, plan: Plan, settings: Settings) -> None:
    """One kernel in one VM, its results in ``RESULTS/SERIES``."""
    outcome, folder = Outcome(series), settings.results / series
    with tempfile.TemporaryDirectory(prefix="matrix-") as scratch:
        try:
            kernel = debian.fetch(series, settings.cache, refresh=settings.refresh)
            initramfs, outcome.key = image.build(kernel, plan, settings.cache, Path(scratch))
            outcome.release = kernel.release
            job = _Job(kernel, initramfs, folder, outcome)
            if not _is_known([job], settings):
                _boot(job, settings)
        except (FetchError, OSError) as error:
            outcome.problem = str(error)
            shutil.rmtree(folder, ignore_errors=True)  # what lies there is of another run
    _keep(folder, outcome)


def two(pair: Sequence[str], plan: Plan, settings: Settings) -> None:
    """Two connected kernels at the same time; results in ``RESULTS/crossings/A-B/SERIES``."""
    home = settings.results / CROSSINGS / "-".join(pair)
    outcomes = [Outcome(series) for series in pair]
    with tempfile.TemporaryDirectory(prefix="matrix-") as scratch:
        try:
            jobs = [_prepare(i, outcomes, plan, settings, Path(scratch), home) for i in (0, 1)]
            together = hashlib.sha256("".join(o.key for o in outcomes).encode()).hexdigest()
            for outcome in outcomes:
                outcome.key = together
            if not _is_known(jobs, settings):
                with ThreadPoolExecutor(2) as pool:
                    list(pool.map(lambda job: _boot(job, settings), jobs))
        except (FetchError, OSError) as error:
            shutil.rmtree(home, ignore_errors=True)
            for outcome in outcomes:
                outcome.problem = outcome.problem or str(error)
    for outcome in outcomes:
        _keep(home / outcome.series, outcome)


def _prepare(
    i: int, outcomes: Sequence[Outcome], plan: Plan, settings: Settings, scratch: Path, home: Path
) -> _Job:
    """The ``i``-th of two. The socket lies in ``scratch``: its path must be short."""
    outcome = outcomes[i]
    kernel = debian.fetch(outcome.series, settings.cache, refresh=settings.refresh)
    outcome.release = kernel.release
    whole = {**plan, "me": outcome.series, "address": _ADDRESSES[i], "peer": _ADDRESSES[1 - i]}
    own = scratch / str(i)
    own.mkdir()
    initramfs, outcome.key = image.build(kernel, whole, settings.cache, own)
    link = vm.Link(scratch / "link", listens=i == 0, mac=_MACS[i])
    return _Job(kernel, initramfs, home / outcome.series, outcome, link)


def _is_known(jobs: Sequence[_Job], settings: Settings) -> bool:
    """Was exactly this booted before, to its end? Then that is the outcome."""
    known = [runs.outcome(job.folder) for job in jobs]
    for job, before in zip(jobs, known, strict=True):
        if settings.fresh or before is None or before.problem or before.key != job.outcome.key:
            return False
    for job, before in zip(jobs, known, strict=True):
        assert before is not None
        job.outcome.seconds, job.outcome.is_cached = before.seconds, True
    return True


def _boot(job: _Job, settings: Settings) -> None:
    folder, kernel = job.folder, job.kernel
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        disk = vm.make_disk(job.initramfs.parent)
        if job.link and not job.link.listens:
            vm.wait_for(job.link.socket, _LISTENING_S)
        say(f"{kernel.series}: booting {kernel.release}")
        files = kernel.vmlinuz, job.initramfs, disk, folder
        line = vm.command(*files, settings.memory_mib, settings.cpus, job.link, settings.nodes)
        boot = vm.run(line, folder, settings.limits)
    except OSError as error:
        job.outcome.problem = str(error)
    else:
        job.outcome.seconds, job.outcome.problem = boot.seconds, boot.problem


def _keep(folder: Path, outcome: Outcome) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runs.save(folder, outcome)
    counts = Counter(str(r["status"]) for r in vm.records(folder / vm.CASES) if "case" in r)
    words = [f"{number} {name}" for name, number in counts.items()]
    for step in vm.records(folder / vm.STEPS):
        if step.get("step") in ("demo", "crossing"):
            words.append(f"{step['step']} {step['backing']} {step['status']}")
    state = ", ".join(words) or "no cases"
    state += f"; PROBLEM: {outcome.problem}" if outcome.problem else ""
    took = "as before" if outcome.is_cached else f"{outcome.seconds:.0f} s"
    say(f"{outcome.series} ({outcome.release or 'no kernel'}), {took}: {state}")
