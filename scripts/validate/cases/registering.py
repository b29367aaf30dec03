"""REGISTER: what is accepted, and which operations it answers."""

import itertools

from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import expect, outcome, refused, same
from scripts.validate.kinds import ALL
from uffd import Feature, Ioctls, Mode

MODES = [Mode(0)]
for _size in (1, 2, 3):
    MODES += [
        Mode(sum(combination))
        for combination in itertools.combinations((Mode.MISSING, Mode.WP, Mode.MINOR), _size)
    ]


def _is_accepted(bench: Bench, mode: Mode) -> bool:
    kind, has = bench.kind, bench.features
    if mode == Mode(0):
        return False
    if Mode.MINOR in mode and (not kind.has_minor or kind.minor_feature not in has):
        return False
    return Mode.WP not in mode or kind.wp_feature in has


@case("unit", on=ALL, name="register-ioctls")
def register_ioctls(bench: Bench) -> None:
    """All eight combinations of MISSING, WP and MINOR: none, and anonymous memory with MINOR, are
    refused; WRITEPROTECT is answered only with WP, CONTINUE only with MINOR, COPY and WAKE always,
    ZEROPAGE everywhere but on hugetlb.
    """
    for mode in MODES:
        uffd, memory = bench.open(), bench.map(1)
        what = f"REGISTER {mode!r}"
        if not _is_accepted(bench, mode):
            with refused(22, what=what):
                uffd.register(memory, mode)
            continue
        answer = uffd.register(memory, mode).ioctls
        basic = Ioctls.COPY | Ioctls.WAKE
        same(answer & basic, basic, f"{what}: COPY and WAKE")
        same(Ioctls.WRITEPROTECT in answer, Mode.WP in mode, f"{what}: WRITEPROTECT")
        same(Ioctls.CONTINUE in answer, Mode.MINOR in mode, f"{what}: CONTINUE")
        same(Ioctls.ZEROPAGE in answer, not bench.kind.is_hugetlb, f"{what}: ZEROPAGE")
        same(Ioctls.POISON in answer, Feature.POISON in bench.features, f"{what}: POISON")
        uffd.close()


@case("unit", on=ALL, name="register-twice")
def register_twice(bench: Bench) -> None:
    """The same fd may register a range again; another one is told that it is taken; after
    unregistering it may.
    """
    uffd, memory = bench.registered(Mode.MISSING)
    uffd.register(memory, Mode.MISSING)
    other = bench.open()
    with refused(16, what="REGISTER of another context's range"):
        other.register(memory, Mode.MISSING)
    bench.either(
        "UNREGISTER of another context's range",
        outcome(lambda: other.unregister(memory)),
        up_to_6_12="succeeds",
        from_6_18="EINVAL",
    )
    uffd.unregister(memory)
    other.register(memory, Mode.MISSING)
    expect(other.queue_depth().total == 0, "nobody waits")
