"""One run: two processes in two namespaces, a migration, a fault in it, what is true after it.

    start -> the moment of the plan -> the fault -> both sides come to rest, by themselves or with
    an operator's help -> recover, or migrate again, or just check -> both processes end

At the end at most one guest ran at any time and nobody lost it who was not killed, its memory is
what it wrote, it still runs, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from guestmem import GuestMemoryError
from tests.chaos import judge
from tests.chaos.ends import BEFORE_COMMIT, BOUND_S, HostLacks, Side, Violation, until
from tests.chaos.heartbeats import Heartbeats
from tests.chaos.hugelimit import HugeLimit, hugelimit
from tests.chaos.moments import Striker, page_after_run, striker
from tests.chaos.network import Network, network
from tests.chaos.plan import Fault, Phase, Plan
from tests.support.guestmem_memory import HUGE, more_hugepages
from tests.support.proxy import Proxy
from tests.support.stream_elements import Phase as Part
from tests.support.tamper import CutAt, Tamper, Watch, page

#: Faults that may leave a silent network: nobody can tell it from a slow one but an operator.
SILENT = frozenset(
    {Fault.LINK_DOWN, Fault.STALL, Fault.FLIP_FRAMING, Fault.FLIP_PAGE, Fault.LINK_FLAP}
)
_QUIET_S = 1.0  # an operator's patience with a silent network


@dataclass
class Scene:
    """What the run consists of, while it runs.

    :ivar story: what happened, for people.
    :ivar hit: the fault found its moment.
    """

    plan: Plan
    net: Network
    folder: Path
    beats: Heartbeats
    source: Side
    destination: Side
    stack: contextlib.ExitStack
    hit: bool = False
    operator: bool = False
    began: float = field(default_factory=time.monotonic)
    proxies: list[Proxy] = field(default_factory=list)
    strikers: list[Striker] = field(default_factory=list)
    limit: HugeLimit | None = None
    story: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        """Note what happens, with the time since the start."""
        self.story.append(f"{time.monotonic() - self.began:7.3f} {text}")

    # -- the network ----------------------------------------------------------------------------

    def proxy(self, uri: str, *tampers: Tamper, framed: bool = False) -> Proxy:
        """A man in the middle, in the namespace the plan says."""
        inside = self.net.source if self.plan.at_source else self.net.destination
        proxy = Proxy(
            uri,
            *tampers,
            listen="tcp",
            framed=framed,
            host=inside.address,
            new_socket=inside.new_socket,
        )
        self.proxies.append(proxy)
        self.stack.callback(proxy.close)
        return proxy

    def drop_connections(self) -> None:
        """Everything a stalled or damaged network still holds is lost."""
        for proxy in self.proxies:
            proxy.cut()
        for each in self.strikers:
            each.go_on()

    # -- sides ----------------------------------------------------------------------------------

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.source, self.destination

    def new_side(self, name: str) -> Side:
        """One more process, in the source's or the destination's namespace."""
        namespace = self.net.source if name == "source" else self.net.destination
        side = Side(name, namespace, self.folder)
        self.stack.callback(side.child.close)
        return side

    def make(self, side: Side, **options: Any) -> None:
        """Its machine; its guest is watched from now on."""
        side.make(**{**self.plan.shape, **options})
        self.beats.add(side.name, side.child.pid, side.child.call("heartbeats"))

    def finish(self, side: Side) -> None:
        """Its orderly end. :raises Violation: it leaves something behind."""
        self.beats.look()
        self.beats.forget(side.name)
        side.finish()

    def describe(self) -> str:
        """Everything that helps to understand a failure."""
        lines = [*self.story, f"movers: {self.beats.movers}"]
        for proxy in self.proxies:
            lines.append(f"proxy: {proxy.names[-60:]} lost: {proxy.lost} {proxy._errors}")
        for side in self.sides:
            with contextlib.suppress(Exception):
                if side.is_alive:
                    lines.append(f"{side.name}: {side.service('query')}")
            lines.append(side.child.describe())
        return "\n".join(lines)


@contextlib.contextmanager
def scene(plan: Plan, *, disk_bytes: int = 0) -> Iterator[Scene]:
    """The two processes and the network, ended whatever happens.

    :param disk_bytes: size of a disk that only the source has; 0: none.
    :raises HostLacks: no huge pages to be had; nothing was begun.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        net = stack.enter_context(network(plan.rate_bits))
        if plan.backing == "hugetlb":
            pages = 3 * plan.ram_bytes // HUGE
            try:
                stack.enter_context(more_hugepages(pages, folder / "journal"))
            except GuestMemoryError as error:
                raise HostLacks(str(error)) from error
        sides = []
        wheres = (("source", net.source, disk_bytes), ("destination", net.destination, 0))
        for name, namespace, disk in wheres:
            side = Side(name, namespace, folder, disk_bytes=disk)
            stack.callback(side.child.close)
            sides.append(side)
        beats = Heartbeats()
        made = Scene(plan, net, folder, beats, sides[0], sides[1], stack)
        stack.enter_context(beats)
        if plan.fault is Fault.NO_HUGEPAGES:
            # Its process must have left the group before the group can go.
            made.limit = stack.enter_context(hugelimit(made.destination.child.pid))
            stack.callback(made.destination.child.close)
        try:
            made.make(made.source)
            made.make(made.destination, incoming=True)
            yield made
        except BaseException as error:
            error.add_note(made.describe())
            raise


# -- one run --------------------------------------------------------------------------------------


def run_on_wire(plan: Plan) -> judge.Outcome:
    """Carry out a plan between two processes and judge it.

    :raises Violation: an invariant does not hold. :raises AssertionError: something does not
        answer within its bound.
    """
    with scene(plan) as it:
        began = time.monotonic()
        migrate(it)
        strike(it)
        come_to_rest(it)
        result = judge.first(it.source, it.destination, plan.fault)
        if not it.hit and result is not judge.Rest.MOVED:
            raise Violation(f"nothing happened to it, and it ended in: {result.value}")
        _require_typed(it)
        it.tell(f"at rest: {result.value}")
        end = follow_up(it, result)
        judge.heartbeats(it.beats)
        for side in it.sides:
            it.finish(side)
        judge.heartbeats(it.beats)
        it.tell(f"ended: {end}")
        moment = it.strikers[0].moment.name if it.strikers else ""
        took = time.monotonic() - began
        return judge.Outcome(plan, it.hit, moment, result, end, it.operator, took, tuple(it.story))


def migrate(it: Scene) -> None:
    """Begin it, with the plan's trap set."""
    plan = it.plan
    switched = dict.fromkeys(plan.capabilities, True) | {"postcopy-ram": plan.is_postcopy}
    for side in it.sides:
        side.service("set_capabilities", switched)
    it.source.service("set_parameters", dict(plan.parameters))
    it.destination.service("set_parameters", {"x-checksum": plan.checksums})
    it.source.child.call("start")
    uri = it.destination.listen()
    tampers: list[Tamper] = []
    if plan.fault is not Fault.NONE and plan.phase is not Phase.RECOVERY:
        it.strikers.append(_striker(plan))
        tampers.append(it.strikers[0])
    if plan.phase is Phase.RECOVERY:
        tampers.append(CutAt(page_after_run(), nth=plan.nth % 30))
    go_over = Watch(page(Part.PRECOPY), nth=plan.precopy_pages)
    proxy = it.proxy(uri, *tampers, go_over)
    if plan.is_postcopy and plan.at_once:
        it.source.child.call("migrate_by_postcopy", proxy.uri)
    else:
        it.source.service("migrate", proxy.uri)
    it.tell(f"migrating to {proxy.uri} by way of {uri}")
    if plan.is_postcopy and not plan.at_once:
        until(lambda: go_over.struck.is_set() or _struck(it) or _both_settled(it), BOUND_S)
        if not _struck(it):
            it.source.service("start_postcopy")
            it.tell("start_postcopy")


def _striker(plan: Plan) -> Striker:
    return striker(
        plan,
        flips_page=plan.fault is Fault.FLIP_PAGE,
        flips_framing=plan.fault is Fault.FLIP_FRAMING,
    )


def _struck(it: Scene) -> bool:
    return any(each.struck.is_set() for each in it.strikers)


def _both_settled(it: Scene) -> bool:
    return all(side.is_settled for side in it.sides)


def strike(it: Scene) -> None:
    """Wait for the moment, and do it."""
    if it.plan.phase is Phase.RECOVERY:
        come_to_rest(it)
        if [side.status for side in it.sides] != ["postcopy-paused"] * 2:
            it.tell("the cut came too late: nothing to recover")
            return
        it.strikers.append(_striker(it.plan))
        begin_recovery(it, it.strikers[0])
    if not it.strikers:
        return
    trap = it.strikers[0]
    until(lambda: trap.struck.is_set() or _both_settled(it), BOUND_S)
    if not trap.struck.is_set():
        if not _both_settled(it):
            raise Violation("neither the moment nor an end came")
        it.tell("the moment never came")
        return
    it.hit = True
    it.tell(
        f"{it.plan.fault.value} at: {trap.moment.name} {trap.damage.done if trap.damage else ''}"
    )
    inflict(it, trap)
    if it.source.is_alive and not it.source.quit:
        it.source.service("set_parameters", {"max-postcopy-bandwidth": 0})  # no need to be slow now
    if it.plan.is_postcopy and it.plan.phase in (Phase.SETUP, Phase.ACTIVE) and it.source.is_alive:
        it.source.try_service("start_postcopy")


def begin_recovery(it: Scene, *tampers: Tamper) -> None:
    """Over a new connection; the operator's two commands."""
    uri = it.destination.listen(recovers=True)
    proxy = it.proxy(uri, *tampers, framed=it.plan.checksums)
    it.tell(f"recovering over {proxy.uri}")
    before = [_recoveries(side) for side in it.sides]
    it.source.service("migrate", proxy.uri, resume=True)
    for side, count in zip(it.sides, before, strict=True):
        if not until(partial(_recovers, side, count), BOUND_S):
            raise Violation(f"{side.name} does not begin its recovery")


def await_recovery(it: Scene) -> None:
    """Until both sides have ended or paused again. :raises Violation: it hangs."""
    if not until(lambda: _both_settled(it), BOUND_S):
        raise Violation("the recovery hangs")


def _recoveries(side: Side) -> int:
    """Those whose connection stood: ``-setup`` is only the wish, which the destination has said
    before anybody connects."""
    return side.child.statuses.count("postcopy-recover")


def _recovers(side: Side, before: int) -> bool:
    return _recoveries(side) > before or not side.is_alive


def inflict(it: Scene, trap: Striker) -> None:
    """The fault itself; the stream stands still meanwhile and flows again after it."""
    plan, source, destination = it.plan, it.source, it.destination
    pause_s = 0.1 + plan.strike % 5 * 0.1
    match plan.fault:
        case Fault.LINK_FLAP:
            it.net.cut(plan.at_source)
            trap.go_on()
            time.sleep(pause_s)  # how long the link is down
            it.net.mend()
        case Fault.LINK_DOWN:
            it.net.cut(plan.at_source)
            trap.go_on()
        case Fault.RESET:
            it.proxies[-1].reset()
        case Fault.CLOSE:
            it.proxies[-1].cut()
        case Fault.HICCUP:
            time.sleep(pause_s)  # how long it lasts
        case Fault.STALL:
            return
        case Fault.KILL_SOURCE | Fault.KILL_DESTINATION:
            (source if plan.fault is Fault.KILL_SOURCE else destination).kill()
        case Fault.FREEZE_SOURCE | Fault.FREEZE_DESTINATION:
            side = source if plan.fault is Fault.FREEZE_SOURCE else destination
            with side.frozen():
                trap.go_on()
                time.sleep(pause_s)  # how long it stands still
        case Fault.CANCEL:
            it.tell(f"migrate_cancel: {source.try_service('cancel')}")
        case Fault.PAUSE:
            side = source if plan.at_source else destination
            it.tell(f"migrate-pause at {side.name}: {side.try_service('pause')}")
        case Fault.NO_HUGEPAGES:
            assert it.limit is not None
            it.limit.now()
        case Fault.QUIT_SOURCE | Fault.QUIT_DESTINATION:
            side = source if plan.fault is Fault.QUIT_SOURCE else destination
            side.quit = True
            it.beats.look()
            it.beats.forget(side.name)
            side.child.call("close")
    trap.go_on()


def come_to_rest(it: Scene) -> None:
    """Until both sides have ended or paused; a silent network takes an operator.

    :raises Violation: one of them hangs.
    """
    if it.hit and it.plan.fault in SILENT:
        _wait_quiet(it)
        if not _both_settled(it):
            operate(it)
    if not until(lambda: _both_settled(it), BOUND_S):
        raise Violation(f"hangs: {[(side.name, side.status) for side in it.sides]}")
    it.net.mend()


def _wait_quiet(it: Scene) -> None:
    """Until both have settled, or nothing was told for a while."""
    seen, since = -1, time.monotonic()
    while not _both_settled(it) and time.monotonic() - since < _QUIET_S:
        now = sum(len(side.child.events) for side in it.sides) + sum(
            sum(proxy.seen.values()) for proxy in it.proxies
        )
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.02)


def operate(it: Scene) -> None:
    """What a person does about a migration that stands still: cancel it while that is possible,
    else cut it off on both sides, and bring the network back."""
    it.operator = True
    source = it.source
    if not source.is_settled:
        doing = "cancel" if source.status in BEFORE_COMMIT else "pause"
        it.tell(f"operator: {doing} at source ({source.status}): {source.try_service(doing)}")
    destination = it.destination
    if not destination.is_settled and destination.status.startswith("postcopy"):
        it.tell(f"operator: pause at destination: {destination.try_service('pause')}")
    it.net.mend()
    if it.plan.strike % 2:
        for trap in it.strikers:
            trap.go_on()  # what was held arrives after all, late
        _wait_quiet(it)
    it.drop_connections()


def _require_typed(it: Scene) -> None:
    """Whoever got damaged bytes says so, and where; unless the damage made it wait for more."""
    if not it.hit or it.operator or it.plan.fault not in (Fault.FLIP_PAGE, Fault.FLIP_FRAMING):
        return
    victim = it.strikers[0].victim
    assert victim is not None
    judge.typed(it.source if victim.phase is Part.RETURN else it.destination)


def follow_up(it: Scene, result: judge.Rest) -> str:
    """What the operator does next, to the end. :returns: how it ended, in a word or two."""
    match result:
        case judge.Rest.MOVED:
            judge.survivor(it.destination, it.beats)
            return "guest at the destination, clean"
        case judge.Rest.STAYED:
            return _after_staying(it)
        case judge.Rest.PAUSED:
            if it.limit is not None:
                it.limit.lift()
            begin_recovery(it)
            await_recovery(it)
            again = judge.first(it.source, it.destination, Fault.NONE)
            if again is not judge.Rest.MOVED:
                raise Violation(f"the recovery ended in: {again.value}")
            judge.survivor(it.destination, it.beats)
            return "recovered, clean"
        case judge.Rest.PAGES_GONE:
            judge.waits_without_pages(it.destination)
            return "guest waits for pages that nobody has"
        case judge.Rest.GUEST_GONE:
            return _after_losing(it)
        case judge.Rest.NOWHERE:
            judge.takes_back(it.source, it.destination)
            it.tell("x-take-back")
            return f"taken back: {_after_staying(it)}"
        case _:
            return "nobody left"


def _after_losing(it: Scene) -> str:
    """The destination went, and with it the guest, unless it had not come to run it."""
    judge.keeps_off(it.source)
    if it.source.status == "completed":
        return "guest gone with the destination"
    # One that was to become a postcopy may have been over before.
    if any(status.startswith("postcopy") for status in it.source.child.statuses):
        judge.cannot_take_back(it.source)
        return "guest gone with the destination"
    # Nobody runs it any more: this operator has looked, and the heartbeats will tell.
    if it.destination.name in it.beats.movers:
        return "guest gone with the destination, where it ran"
    judge.takes_back(it.source, it.destination)
    it.tell("x-take-back")
    return f"taken back: {_after_staying(it)}"


def _after_staying(it: Scene) -> str:
    judge.not_running(it.destination)
    it.finish(it.destination)
    judge.alive(it.source, it.beats)
    if not it.plan.again:
        judge.survivor(it.source, it.beats)
        return "guest at the source, clean"
    other = it.new_side("another destination")
    it.make(other, incoming=True)
    it.destination = other
    plain = dict.fromkeys(it.plan.capabilities, False) | {"postcopy-ram": True}
    for side in it.sides:
        side.service("set_capabilities", plain)
    it.source.service("set_parameters", {"max-bandwidth": 0, "max-postcopy-bandwidth": 0})
    uri = other.listen()
    before = len(it.source.child.statuses)
    it.source.child.call("migrate_by_postcopy", uri)
    if not until(lambda: len(it.source.child.statuses) > before and _both_settled(it), BOUND_S):
        raise Violation("the second migration hangs")
    if judge.first(it.source, other, Fault.NONE) is not judge.Rest.MOVED:
        raise Violation("the second migration did not come through")
    judge.survivor(other, it.beats)
    return "guest migrated again, clean"
