"""What must be true when both sides have come to rest, and at the end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tests.chaos.ends import BOUND_S, Side, Violation, until
from tests.chaos.heartbeats import Heartbeats
from tests.chaos.plan import Fault, Plan
from tests.support.e2e_child import Refused


class Rest(StrEnum):
    """Who has the guest once everything stands still."""

    MOVED = "moved"  # to the destination, with all of its memory
    STAYED = "stayed"  # at the source, which runs it again
    PAUSED = "paused"  # at the destination, pages still at the source; a recovery brings them
    PAGES_GONE = "pages gone"  # at the destination; the source, and with it pages, are gone
    GUEST_GONE = "guest gone"  # with the destination; the source keeps off
    NOWHERE = "nowhere"  # a precopy lost its last word: held at the source, never ran elsewhere
    NOBODY = "nobody"  # both are gone


@dataclass(frozen=True)
class Outcome:
    """One run.

    :ivar hit: the fault found its moment. :ivar moment: which one.
    :ivar rest: where things stood after the fault. :ivar end: what they came to.
    :ivar operator: somebody had to help. :ivar story: what happened when.
    """

    plan: Plan
    hit: bool
    moment: str
    rest: Rest
    end: str
    operator: bool
    seconds: float
    story: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "seed": self.plan.seed,
            "phase": self.plan.phase.value,
            "fault": self.plan.fault.value,
            "moment": self.moment,
            "hit": self.hit,
            "rest": self.rest.value,
            "end": self.end,
            "operator": self.operator,
            "seconds": round(self.seconds, 2),
        }


def first(source: Side, destination: Side, fault: Fault) -> Rest:
    """Where things stand.

    :raises Violation: a combination that must not be: two guests, or none though nobody was lost.
    """
    here = _ended(source) or source.status
    there = _ended(destination) or destination.status
    at_source = here not in ("gone", "quit") and source.run_state == "running"
    at_destination = there not in ("gone", "quit") and destination.run_state == "running"
    if at_source and at_destination:
        raise Violation("both sides say that their guest runs")
    if at_source:
        if here not in ("failed", "cancelled"):
            raise Violation(f"the source runs its guest in status {here}")
        return Rest.STAYED
    if at_destination:
        return _at_destination(here, there)
    if here == there == "postcopy-paused":
        return Rest.PAUSED  # RUN was lost on its way; it comes again with the recovery
    if there in ("gone", "quit"):
        return Rest.GUEST_GONE if here not in ("gone", "quit") else Rest.NOBODY
    if here in ("gone", "quit"):
        return Rest.NOBODY  # it went before the guest was given away
    if here == there == "failed" and "x-take-back" in source.error:
        return Rest.NOWHERE
    raise Violation(
        f"the guest is nowhere: source {here} ({source.error}), destination {there} "
        f"({destination.error}) after {fault.value}"
    )


def _ended(side: Side) -> str:
    if not side.is_alive:
        return "gone"
    return "quit" if side.quit else ""


def _at_destination(here: str, there: str) -> Rest:
    if there == "completed":
        return Rest.MOVED
    if there != "postcopy-paused":
        raise Violation(f"the guest runs at the destination in status {there}")
    if here in ("gone", "quit"):
        return Rest.PAGES_GONE
    if here != "postcopy-paused":
        raise Violation(f"the destination waits for pages, but the source is {here}")
    return Rest.PAUSED


def heartbeats(beats: Heartbeats) -> None:
    """:raises Violation: two guests, by their own hearts."""
    if beats.violations:
        raise Violation("; ".join(beats.violations))


def alive(side: Side, beats: Heartbeats) -> None:
    """Its guest does something. :raises Violation: it does not."""
    before = beats.beats(side.name)
    if not until(lambda: beats.beats(side.name) > before, BOUND_S):
        raise Violation(f"the guest at {side.name} is said to run and does nothing")


def survivor(side: Side, beats: Heartbeats) -> None:
    """The guest runs there and every page is what it wrote. :raises Violation: not so."""
    alive(side, beats)
    report = side.child.call("sweep")
    if report["errors"] or side.child.call("statistics")["touch_errors"]:
        raise Violation(f"the oracle at {side.name}: {report}")
    if not report["pages_checked"]:
        raise Violation("the oracle looked at nothing")


def not_running(side: Side) -> None:
    """The guest stayed at the source: the destination does not run it, and lets go of it if it
    still waits for the word to do so.

    :raises Violation: not so.
    """
    if not side.is_alive or side.quit:
        return
    if side.status == "postcopy-paused":
        side.service("cancel")
        if not until(lambda: side.status == "failed", BOUND_S):
            raise Violation(f"{side.name} does not give up: {side.status}")
    if side.run_state != "inmigrate":
        raise Violation(f"{side.name} is {side.run_state} though the guest stayed")


def waits_without_pages(side: Side) -> None:
    """The source is gone: nothing was made up for the pages that went with it.

    :raises Violation: the guest saw something it did not write.
    """
    statistics = side.child.call("statistics")
    if statistics["touch_errors"]:
        raise Violation(f"pages were made up: {statistics}")
    if side.run_state != "running":
        raise Violation(f"the guest is not left running: {side.run_state}")


def keeps_off(side: Side) -> None:
    """The guest is gone with the destination: the source says so and does not start it.

    :raises Violation: it does, or does not say whose it is.
    """
    if side.status == "completed":
        return  # it was all over before the destination went
    if "the guest is the destination's" not in side.error:
        raise Violation(f"the source does not say who has the guest: {side.error}")
    try:
        side.service("cont")
    except Refused:
        return
    raise Violation("the source let itself be told to start the guest again")


def cannot_take_back(source: Side) -> None:
    """In postcopy the guest may have run elsewhere. :raises Violation: it can be taken back."""
    if source.take_back(not_running_elsewhere=True) is None:
        raise Violation("the guest of a postcopy was taken back")


def takes_back(source: Side, destination: Side) -> None:
    """The guest of a precopy runs nowhere: the source holds it, and lets it go on when it is told
    that the destination does not run it, and only then.

    :param destination: gone, or failed before it ran the guest, which it then stays.
    :raises Violation: not so.
    """
    if destination.is_alive and not destination.quit and destination.run_state != "inmigrate":
        raise Violation(f"the destination is {destination.run_state} and never ran the guest")
    if source.run_state != "finish-migrate":
        raise Violation(f"the source does not hold its guest: {source.run_state}")
    if source.try_service("cont") is None:
        raise Violation("the source let itself be told to start the guest by 'cont'")
    if source.take_back(not_running_elsewhere=False) is None:
        raise Violation("the source took its guest back though nobody said it is nowhere")
    if (refusal := source.take_back(not_running_elsewhere=True)) is not None:
        raise Violation(f"the source does not take its guest back: {refusal}")
    if source.run_state != "running":
        raise Violation(f"the guest was taken back and is {source.run_state}")


def typed(side: Side) -> None:
    """A damaged stream is refused by name and place. :raises Violation: it is not."""
    if not re.search(r"stream offset 0x[0-9a-f]+", side.error):
        raise Violation(f"{side.name} does not say where the stream is damaged: {side.error}")
