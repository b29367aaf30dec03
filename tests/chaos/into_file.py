"""Runs whose target is a file: the disk is full, the writer is cancelled, killed, told to quit.

The file lies on a small file system that only the source's process has mounted, so it goes with it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.chaos import judge
from tests.chaos.ends import BOUND_S, Violation, until
from tests.chaos.forked import DISK
from tests.chaos.plan import Fault, Plan
from tests.chaos.scene import Scene, scene

# Until its speed is known, a tenth of a second, a stream goes round and round.
_ROOM_BYTES = 512 << 20
_DISK_FULL = "No space left|is full"


def run(plan: Plan) -> judge.Outcome:
    """Carry out a plan and judge it. :raises Violation, AssertionError: as on the wire."""
    room = plan.ram_bytes // 4 if plan.fault is Fault.DISK_FULL else _ROOM_BYTES
    with scene(plan, disk_bytes=room) as it:
        began = time.monotonic()
        moment = _write(it)
        rest, end = _judge(it)
        judge.heartbeats(it.beats)
        for side in it.sides:
            it.finish(side)
        judge.heartbeats(it.beats)
        took = time.monotonic() - began
        return judge.Outcome(plan, it.hit, moment, rest, end, False, took, tuple(it.story))


def _seen_from_here(it: Scene) -> Path:
    """The source's disk, by way of its process."""
    return Path(f"/proc/{it.source.child.pid}/root{DISK}")


def _write(it: Scene) -> str:
    plan, source = it.plan, it.source
    source.service("set_capabilities", {"mapped-ram": plan.mapped, "postcopy-ram": False})
    parameters = dict(plan.parameters)
    if plan.fault is Fault.NONE:
        parameters["max-bandwidth"] = 0  # faster than any guest writes, or the disk is too small
    elif not plan.mapped:
        parameters["max-bandwidth"] = plan.ram_bytes  # a second, so that there is a middle
    source.service("set_parameters", parameters)
    source.child.call("start")
    source.service("migrate", f"file:{DISK}/guest")
    if plan.fault not in (Fault.NONE, Fault.DISK_FULL):
        until(lambda: "active" in source.child.statuses, BOUND_S)
        it.hit = not source.is_settled
        if plan.fault is Fault.CANCEL:
            it.tell(f"migrate_cancel: {source.try_service('cancel')}")
        elif plan.fault is Fault.KILL_SOURCE:
            source.kill()
        else:
            source.quit = True
            it.beats.look()
            it.beats.forget(source.name)
            source.child.call("close")
    if not until(lambda: source.is_settled, BOUND_S):
        raise Violation(f"hangs in {source.status}")
    it.hit = it.hit or plan.fault is Fault.DISK_FULL
    return "a mapped file" if plan.mapped else "a stream into a file"


def _judge(it: Scene) -> tuple[judge.Rest, str]:
    source = it.source
    if not source.is_alive or source.quit:
        return judge.Rest.NOBODY, "nobody left"
    if source.status == "completed":
        if it.plan.fault is Fault.DISK_FULL:
            raise Violation("a guest was written to a disk that has no room for it")
        return judge.Rest.MOVED, _read_back(it)
    if it.plan.fault is Fault.NONE:
        raise Violation(f"{source.status} though nothing happened: {source.error}")
    if source.run_state != "running":
        raise Violation(f"{source.status}, and the guest is {source.run_state}: {source.error}")
    if it.plan.fault is Fault.DISK_FULL and not re.search(_DISK_FULL, source.error):
        raise Violation(f"the source does not say that the disk is full: {source.error}")
    if it.plan.mapped and (left := list(_seen_from_here(it).iterdir())):
        raise Violation(f"half a file was left: {left}")
    judge.survivor(source, it.beats)
    return judge.Rest.STAYED, "guest at the source, clean"


def _read_back(it: Scene) -> str:
    destination = it.destination
    destination.service("set_capabilities", {"mapped-ram": it.plan.mapped, "postcopy-ram": False})
    destination.service("migrate_incoming", f"file:{_seen_from_here(it)}/guest")
    if not until(lambda: destination.is_settled, BOUND_S):
        raise Violation(f"reading it back hangs in {destination.status}")
    if destination.status != "completed":
        raise Violation(f"reading it back: {destination.error}")
    judge.survivor(destination, it.beats)
    return "guest read back, clean"
