"""Bodies of cases that end badly, run by the runner in a process without pytest's own timers.

``python -m tests.support.validate_bodies NAME`` prints the result as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from scripts.validate.actors import loading
from scripts.validate.check import Skipped, expect, same
from scripts.validate.kinds import ANON
from scripts.validate.runner import isolated
from uffd import Userfaultfd, touch

TIMEOUT_S = {"hangs": 0.5}


def passes() -> list[str]:
    expect(True, "something holds")
    return ["seen"]


def checks_nothing() -> list[str]:
    return []


def differs() -> list[str]:
    same(bytes(64) + b"\1", bytes(65), "contents")
    return []


def skips() -> list[str]:
    raise Skipped("not here", "do that")


def dies() -> list[str]:
    touch.load(8)  # nothing is mapped there
    return []


def hangs() -> list[str]:
    with Userfaultfd.open() as uffd:
        memory = ANON.map(1)
        uffd.register(memory)
        touch.load(memory.address)  # nobody serves it
    return []


def leaves_a_child() -> list[str]:
    """The child holds our standard output open until it is killed; a thread sleeps for ever."""
    if os.fork() == 0:
        signal.pause()
    uffd, memory = Userfaultfd.open(), ANON.map(1)
    uffd.register(memory)
    loading(memory.address)
    expect(uffd.wait(10), "a thread sleeps")
    return []


if __name__ == "__main__":
    name = sys.argv[1]
    result = isolated(name, globals()[name], TIMEOUT_S.get(name, 10))
    print(json.dumps(result.record()))
