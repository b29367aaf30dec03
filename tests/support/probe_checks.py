"""A catalogue of checks that misbehave, for the warden of ``postcopy probe`` to survive."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from migration.probe import Cause, Check, Outcome, Tier
from migration.probe.row import no, yes

CATALOGUE = f"{__name__}:checks"
#: Where the hanging check leaves the pids of itself and of the process it started.
PIDS_VARIABLE = "PROBE_TEST_PIDS"


def good() -> Outcome:
    return yes("fine")


def refused() -> Outcome:
    return no(Cause.SETTING, "switched off", "switch it on")


def crash() -> Outcome:
    """Read where nothing is."""
    return yes(str(ctypes.string_at(8)))


def hang() -> Outcome:
    """Sleep through polite signals, with a child that does the same."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = os.fork()
    if child:
        Path(os.environ[PIDS_VARIABLE]).write_text(f"{os.getpid()} {child}")
    while True:
        time.sleep(3600)


def stuck() -> Outcome:
    """Sleep for good, quietly."""
    time.sleep(3600)
    return yes()


def leave() -> Outcome:
    """End without a word."""
    os._exit(7)


def fail() -> Outcome:
    raise RuntimeError("a mistake\nof two lines")


def deny() -> Outcome:
    raise PermissionError(1, "not for you")


def talk() -> Outcome:
    """What a library prints must not get into the answers."""
    print("noise on standard output", flush=True)
    os.write(1, b'{"name": "good", "outcome": null}\n')
    return yes()


def ramble() -> Outcome:
    return yes("word " * 100_000)


def checks() -> list[Check]:
    """All of them; the first and the last behave."""
    runs = (good, crash, hang, leave, fail, deny, refused, talk, ramble)
    more = [
        Check(f"hang-{number}", "the same again", Tier.OPTIONAL, "test", stuck)
        for number in range(5)
    ]
    found = [
        Check(run.__name__, f"a check that does {run.__name__}", Tier.OPTIONAL, "test", run)
        for run in runs
    ]
    return [*found, *more, Check("last", "another good one", Tier.REQUIRED, "test", good, "4.3")]
