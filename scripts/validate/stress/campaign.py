"""Many seeds, one after the other, each a world in a process of its own."""

import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from scripts.validate import mutants
from scripts.validate.check import Skipped
from scripts.validate.host import Host, hugepages
from scripts.validate.kinds import KINDS, Kind
from scripts.validate.runner import FAIL, Result, isolated
from scripts.validate.stress.world import World
from uffd import Feature

_TIMEOUT_S = 30.0
_STEPS, _STEPS_HUGETLB = 40, 12
# By seed; huge pages seldom, they cost a hundred times as much.
_ROTATION = ("anon", "shmem", "anon", "shmem-private", "anon", "shmem", "anon", "hugetlb")


@dataclass(frozen=True)
class Plan:
    """How long (``seconds``) or how many (``seeds``), from which seed on; ``None`` is random."""

    seconds: float | None = None
    seeds: int | None = None
    threads: int = 2
    first_seed: int | None = None
    memory: str | None = None
    mutant: str | None = None


def _kind(plan: Plan, seed: int, has_hugepages: bool) -> Kind:
    if plan.memory is not None:
        if plan.memory not in KINDS:
            raise ValueError(f"no memory type {plan.memory}; there are {', '.join(KINDS)}")
        return KINDS[plan.memory]
    name = _ROTATION[seed % len(_ROTATION)]
    return KINDS["anon" if name == "hugetlb" and not has_hugepages else name]


def run_seed(host: Host, plan: Plan, seed: int, kind: Kind) -> Result:
    """One world."""
    steps = _STEPS_HUGETLB if kind.is_hugetlb else _STEPS

    def body() -> list[str]:
        if plan.mutant is not None:
            mutants.apply(plan.mutant)
        features = host.features or Feature.NONE
        world = World(kind, features, random.Random(seed), plan.threads)
        world.run(steps)
        return world.trace

    return isolated(f"seed {seed} on {kind.name}", body, _TIMEOUT_S)


def run(host: Host, plan: Plan, *, say: Callable[[str], None]) -> bool:
    """Run until the time is over or the seeds are through; stop at the first failure.

    :returns: whether none failed.
    :raises ValueError: no such memory type. :raises OSError: no userfaultfd.
    """
    if host.features is None:
        raise OSError(f"no userfaultfd: {host.refusal}")
    needs_huge = plan.memory is None or plan.memory.startswith("hugetlb")
    missing: Skipped | None = hugepages().missing(host) if needs_huge else None
    if missing is not None:
        say(f"# without huge pages: {missing.reason}; remedy: {missing.remedy}")
    seed = secrets.randbelow(1 << 31) if plan.first_seed is None else plan.first_seed
    say(f"# first seed {seed}, {plan.threads} threads, kernel {host.release}")
    until = time.monotonic() + (plan.seconds or 0)
    done = steps = checks = 0
    while done < plan.seeds if plan.seeds is not None else time.monotonic() < until:
        kind = _kind(plan, seed, missing is None)
        result = run_seed(host, plan, seed, kind)
        if result.status == FAIL:
            memory = f" --memory {plan.memory}" if plan.memory else ""
            say(f"not ok - {result.case}: {result.reason}")
            say(f"# again: --stress-seeds 1 --seed {seed} --threads {plan.threads}{memory}")
            return False
        if plan.seeds == 1:
            for step in result.remarks:
                say(f"# {step}")
        done, seed = done + 1, seed + 1
        steps, checks = steps + len(result.remarks), checks + result.checks
    say(f"ok - {done} seeds, {steps} steps, {checks} checks")
    return True
