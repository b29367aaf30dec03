"""Each invariant of the judge can fail: runs that are really broken, by hand, with real processes.

A judge that never finds anything proves nothing. Nothing is replaced here: a second guest really
runs, a page is really wrong, a thread is really left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from guestmem.geometry import TARGET_PAGE_BYTES
from tests.chaos import into_file, judge, scene
from tests.chaos.__main__ import plan_of
from tests.chaos.ends import Side, Violation, until
from tests.chaos.judge import Rest
from tests.chaos.plan import MIB, Fault, Phase, Plan
from tests.chaos.scene import (
    Scene,
    await_recovery,
    begin_recovery,
    come_to_rest,
    migrate,
    run_on_wire,
    strike,
)
from tests.support.tamper import StallAt, command
from uffd import PageAlreadyPresent, Userfaultfd, pidfd_getfd, pidfd_open

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

PATIENCE_S = 2.0  # of a judge who is to lose it


def plan(
    phase: Phase = Phase.POSTCOPY, fault: Fault = Fault.NONE, *, checksums: bool = True
) -> Plan:
    """A small quick guest; only what the test is about happens to it."""
    drawn = plan_of(1, phase=phase, fault=fault)
    return replace(
        drawn,
        at_once=True,
        ram_bytes=4 * MIB,
        backing="anon",
        vcpu="thread",
        rate=10_000,
        ring_pages=0,
        fill_share=1.0,
        capabilities=(),
        parameters=(("x-checksum", checksums), ("max-postcopy-bandwidth", 0)),
    )


@contextmanager
def moved() -> Iterator[Scene]:
    """A guest that went over as it should."""
    with scene.scene(plan()) as it:
        migrate(it)
        come_to_rest(it)
        assert judge.first(it.source, it.destination, Fault.NONE) is Rest.MOVED
        yield it


@contextmanager
def source_killed() -> Iterator[Scene]:
    """A guest that waits for pages nobody has any more."""
    slowly = replace(plan(fault=Fault.KILL_SOURCE), moment=0, nth=0)  # right after RUN
    with scene.scene(slowly) as it:
        migrate(it)
        strike(it)
        come_to_rest(it)
        assert judge.first(it.source, it.destination, Fault.KILL_SOURCE) is Rest.PAGES_GONE
        yield it


def test_measure() -> None:
    """The same without anything broken: no violation."""
    assert run_on_wire(plan()).rest is Rest.MOVED


def test_two_guests() -> None:
    """The source runs its guest again after it moved: by its own word, and by the heartbeats of
    vCPUs that nobody asked."""
    with moved() as it:
        assert until(lambda: it.beats.movers == ["source", "destination"], 30)
        judge.heartbeats(it.beats)
        it.source.child.call("start")
        with pytest.raises(Violation, match="both sides say that their guest runs"):
            judge.first(it.source, it.destination, Fault.NONE)
        assert until(lambda: bool(it.beats.violations), 30)
        with pytest.raises(Violation, match="runs at source again after it ran at destination"):
            judge.heartbeats(it.beats)


def test_no_guest() -> None:
    """Stopped where it went, so that it runs nowhere."""
    with moved() as it:
        it.destination.service("stop_guest")
        with pytest.raises(Violation, match="nowhere"):
            judge.first(it.source, it.destination, Fault.NONE)


def test_a_guest_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it runs, but its process was stopped."""
    monkeypatch.setattr(judge, "BOUND_S", PATIENCE_S)
    with moved() as it:
        with it.destination.frozen():
            assert until(lambda: stands_still(it.destination), 30)
            with pytest.raises(Violation, match="does nothing"):
                judge.alive(it.destination, it.beats)
        judge.alive(it.destination, it.beats)


def stands_still(side: Side) -> bool:
    """The signal has reached every thread."""
    tasks = Path(f"/proc/{side.child.pid}/task")
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
    return set(states) == {"T"}


def test_a_wrong_page() -> None:
    """A byte flipped on the wire with checksums off: nobody notices but the oracle, and the judge
    misses the error that should have named it."""
    flipped = replace(plan(fault=Fault.FLIP_PAGE, checksums=False), moment=1, nth=3, at_once=True)
    with scene.scene(replace(flipped, write_share=0.0)) as it:
        migrate(it)
        strike(it)
        come_to_rest(it)
        assert it.hit
        assert judge.first(it.source, it.destination, plan().fault) is Rest.MOVED
        with pytest.raises(Violation, match="does not say where the stream is damaged"):
            judge.typed(it.destination)
        with pytest.raises(Violation, match=r"the oracle at destination: .*'errors': 1"):
            judge.survivor(it.destination, it.beats)


def test_pages_made_up() -> None:
    """Zeros placed behind everybody's back, through the destination's own userfaultfd."""
    with source_killed() as it:
        judge.waits_without_pages(it.destination)
        for fd in userfaultfds(it.destination):
            with fd:
                for host, length in it.destination.child.call("ram").values():
                    for address in range(host, host + length, TARGET_PAGE_BYTES):
                        with suppress(PageAlreadyPresent):
                            fd.zeropage(address, TARGET_PAGE_BYTES)
        assert until(lambda: it.destination.child.call("statistics")["touch_errors"] > 0, 30)
        with pytest.raises(Violation, match="pages were made up"):
            judge.waits_without_pages(it.destination)


def userfaultfds(side: Side) -> Iterator[Userfaultfd]:
    """Another process's, duplicated."""
    pidfd = pidfd_open(side.child.pid)
    try:
        folder = f"/proc/{side.child.pid}/fd"
        for name in os.listdir(folder):
            if os.readlink(f"{folder}/{name}") == "anon_inode:[userfaultfd]":
                yield Userfaultfd.from_fd(pidfd_getfd(pidfd, int(name)))
    finally:
        os.close(pidfd)


def test_a_guest_left_standing_without_pages() -> None:
    """Stopped although it could run on."""
    with source_killed() as it:
        it.destination.service("stop_guest")
        with pytest.raises(Violation, match="not left running: paused"):
            judge.waits_without_pages(it.destination)


def test_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that stands still, and nobody does anything about it."""
    monkeypatch.setattr(scene, "BOUND_S", PATIENCE_S)
    with scene.scene(plan(fault=Fault.STALL)) as it:
        migrate(it)
        it.strikers[0].struck.wait(30)
        with pytest.raises(Violation, match=r"hangs: .*'source', 'postcopy-active'"):
            come_to_rest(it)  # the scene was not told of the fault: no operator comes


def test_a_recovery_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second connection stands still."""
    with scene.scene(replace(plan(fault=Fault.CLOSE), moment=0)) as it:
        migrate(it)
        strike(it)
        come_to_rest(it)
        assert judge.first(it.source, it.destination, Fault.CLOSE) is Rest.PAUSED
        begin_recovery(it, StallAt(command("RECV_BITMAP"), after=0))
        monkeypatch.setattr(scene, "BOUND_S", PATIENCE_S)
        with pytest.raises(Violation, match="the recovery hangs"):
            await_recovery(it)


def test_something_left_behind() -> None:
    """A thread and a descriptor, and a file in the process's own folder."""
    with moved() as it:
        it.destination.child.call("leave_behind")
        (it.source.folder / "left").write_text("")
        with pytest.raises(Violation, match=r"left behind: .*1 x /dev/null.*; thread: "):
            it.finish(it.destination)
        with pytest.raises(Violation, match="source left files behind"):
            it.finish(it.source)


def test_a_source_that_does_not_keep_off() -> None:
    """Killed before anything was given away: the source goes on, and says nothing of an owner."""
    with scene.scene(replace(plan(Phase.SETUP, Fault.KILL_DESTINATION), moment=0)) as it:
        migrate(it)
        strike(it)
        come_to_rest(it)
        assert judge.first(it.source, it.destination, Fault.KILL_DESTINATION) is Rest.STAYED
        with pytest.raises(Violation, match="does not say who has the guest"):
            judge.keeps_off(it.source)
        with pytest.raises(Violation, match="does not hold its guest"):
            judge.takes_back(it.source, it.destination)


def test_a_destination_that_runs_a_guest_that_stayed() -> None:
    with moved() as it, pytest.raises(Violation, match="running though the guest stayed"):
        judge.not_running(it.destination)


def test_a_full_disk_that_is_not() -> None:
    """Room enough for all of it: a run that should have run into the end of the disk did not."""
    full = replace(plan(Phase.FILE, Fault.DISK_FULL), mapped=False, write_share=0.0)
    with scene.scene(full, disk_bytes=4 * full.ram_bytes) as it:
        into_file._write(it)
        with pytest.raises(Violation, match="a disk that has no room"):
            into_file._judge(it)
