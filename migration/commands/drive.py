"""One migration driven through QMP: settings, start, switch to postcopy, to the end."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from guestmem.geometry import TARGET_PAGE_BYTES

from .qmp_link import CommandFailed, VMLink

ENDED = frozenset({"completed", "failed", "cancelled", "postcopy-paused"})
_OF_BOTH = ("multifd-channels", "multifd-compression")
"""Parameters that must be the same at both ends."""
_POLL_S = 0.25
UNHEARD_S = 10.0
"""How long a source may still wait for the last word of a destination that has completed."""


@dataclass(frozen=True)
class Plan:
    """What the user wants.

    :ivar postcopy_after_s: switch to postcopy so long after the start; None: precopy only.
    :ivar converge_within_s: from so long after the start on, switch to postcopy once what is left
        would stop the guest longer than ``downtime-limit`` allows.
    :ivar timeout_s: give up (and cancel, where that is still possible) after so long.
    :ivar capabilities: switched on beside those the plan needs.
    :ivar parameters: set before the start, QEMU's names and units.
    :ivar listen: what the destination is told, when it is not ``uri``.
    :ivar resume: go on with a migration that is paused.
    """

    uri: str
    listen: str | None = None
    resume: bool = False
    postcopy_after_s: float | None = None
    converge_within_s: float | None = None
    timeout_s: float | None = None
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)

    @property
    def wants_postcopy(self) -> bool:
        """Postcopy may come of it."""
        return self.postcopy_after_s is not None or self.converge_within_s is not None


@dataclass(frozen=True)
class Progress:
    """What the source said at one moment.

    :ivar seconds: since the start.
    :ivar info: its ``query-migrate``.
    :ivar pages_per_s, requests_per_s: over the time since the moment before.
    :ivar destination: the destination's ``query-migrate``, where it can be asked.
    """

    seconds: float
    info: Mapping[str, object]
    pages_per_s: float = 0.0
    requests_per_s: float = 0.0
    destination: Mapping[str, object] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """QMP's name."""
        return str(self.info.get("status", "none"))

    def ram(self, name: str) -> float:
        """A figure out of ``ram``; 0 when the source does not say."""
        ram = self.info.get("ram")
        value = ram.get(name, 0) if isinstance(ram, Mapping) else 0
        return float(value) if isinstance(value, int | float) else 0.0

    @property
    def pages(self) -> float:
        """Pages sent so far, zero pages among them."""
        return self.ram("normal") + self.ram("duplicate")

    @property
    def is_complete_there(self) -> bool:
        """The destination says that it has everything."""
        return self.destination.get("status") == "completed"

    @property
    def latency_counts(self) -> list[int]:
        """How long faults took, by powers of two of microseconds; empty when nobody counted."""
        ours = self.destination.get("x-postcopy")
        for where in (self.destination, ours):
            counts = where.get("postcopy-latency-dist") if isinstance(where, Mapping) else None
            if isinstance(counts, list) and any(counts):
                return counts
        return []

    def latency_us(self, share: float) -> int | None:
        """The microseconds in which this share of the faults was over, rounded up to a power of
        two; None when nobody counted."""
        counts = self.latency_counts
        left = share * sum(counts)
        for bucket, count in enumerate(counts):
            left -= count
            if count and left <= 0:
                return 2 << bucket
        return None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the present speed; None when it cannot be told."""
        bytes_per_s = self.pages_per_s * (self.ram("page-size") or TARGET_PAGE_BYTES)
        return self.ram("remaining") / bytes_per_s if bytes_per_s > 0 else None

    def converges(self, downtime_limit_ms: float) -> bool:
        """What is left fits the allowed pause at the present bandwidth, or is sent already."""
        expected = self.info.get("expected-downtime")
        if self.status != "active" or not isinstance(expected, int | float):
            return self.status not in ("none", "setup", "active")
        return expected <= downtime_limit_ms

    def after(self, before: Progress | None) -> Progress:
        """The same with rates against an earlier moment."""
        span_s = self.seconds - before.seconds if before else 0.0
        if before is None or span_s <= 0:
            return self
        requests = self.ram("postcopy-requests") - before.ram("postcopy-requests")
        return Progress(
            self.seconds,
            self.info,
            pages_per_s=max(0.0, self.pages - before.pages) / span_s,
            requests_per_s=max(0.0, requests) / span_s,
            destination=self.destination,
        )


class TimedOut(CommandFailed):
    """The migration did not end in the time it was given."""


Observer = Callable[[Progress], None]
OnPause = Callable[[Progress], Awaitable[bool]]
DestinationInfo = Callable[[], Mapping[str, object]]


async def configure(vm: VMLink, plan: Plan, *, is_source: bool) -> None:
    """Switch on what the plan needs, at one side.

    :raises CommandFailed: the VM does not offer it.
    """
    names = ["events", *plan.capabilities]
    if is_source:
        names.append("return-path")  # with it the source knows whether the destination got it all
    if plan.wants_postcopy:
        names.append("postcopy-ram")
    states = [{"capability": name, "state": True} for name in dict.fromkeys(names)]
    await vm.execute("migrate-set-capabilities", {"capabilities": states})
    parameters = dict(plan.parameters)
    if not is_source:
        parameters = {name: parameters[name] for name in _OF_BOTH if name in parameters}
    if parameters:
        await vm.execute("migrate-set-parameters", parameters)


async def drive(
    source: VMLink,
    plan: Plan,
    observe: Observer,
    *,
    on_pause: OnPause | None = None,
    destination: DestinationInfo | None = None,
) -> Progress:
    """Start the configured migration (unless it is to be resumed) and follow it to its end (or
    pause).

    :param observe: called at every change of status and a few times a second.
    :param on_pause: tries to get a paused one going again; whether it did.
    :param destination: what the destination said last.
    :returns: the last figures; ``status`` says how it ended.
    :raises TimedOut: it took too long; it was cancelled unless the guest had already moved.
    """
    if not plan.resume:
        await source.execute("migrate", {"uri": plan.uri})
    return await _Follower(source, plan, observe, on_pause, destination).follow()


class _Follower:
    """One migration being watched."""

    def __init__(
        self,
        source: VMLink,
        plan: Plan,
        observe: Observer,
        on_pause: OnPause | None,
        destination: DestinationInfo | None,
    ) -> None:
        self._source = source
        self._plan = plan
        self._observe = observe
        self._on_pause = on_pause
        self._destination = destination or dict
        self._started = time.monotonic()
        self._last: Progress | None = None
        self._complete_since: float | None = None
        self._wants_postcopy = plan.wants_postcopy

    async def follow(self) -> Progress:
        progress = await self._look()
        while not self._is_unheard(progress) and (
            progress.status not in ENDED or await self._goes_on(progress)
        ):
            if self._wants_postcopy and await self._is_due(progress):
                await self._start_postcopy()
            if self._left(self._plan.timeout_s) <= 0:
                await self._give_up(progress)
            await self._source.wait_change(self._next_wait_s())
            progress = await self._look()
        return progress

    def _is_unheard(self, progress: Progress) -> bool:
        """The destination's last word was lost. A QEMU 7.2 waits for it for ever."""
        if not progress.is_complete_there or progress.status in ENDED:
            self._complete_since = None
            return False
        if self._complete_since is None:
            self._complete_since = progress.seconds
        return progress.seconds - self._complete_since >= UNHEARD_S

    async def _goes_on(self, progress: Progress) -> bool:
        """Whether a paused migration was got going again."""
        if progress.status != "postcopy-paused" or self._on_pause is None:
            return False
        return await self._on_pause(progress)

    async def _is_due(self, progress: Progress) -> bool:
        """Whether it is time for postcopy."""
        if self._left(self._plan.postcopy_after_s) <= 0:
            return True
        if self._left(self._plan.converge_within_s) > 0:
            return False
        parameters = await self._source.execute("query-migrate-parameters")
        return not progress.converges(float(parameters["downtime-limit"]))

    def _left(self, limit_s: float | None) -> float:
        if limit_s is None:
            return float("inf")
        return self._started + limit_s - time.monotonic()

    def _next_wait_s(self) -> float:
        waits = [_POLL_S, self._left(self._plan.timeout_s)]
        if self._wants_postcopy:
            waits.append(self._left(self._plan.postcopy_after_s))
            left_s = self._left(self._plan.converge_within_s)
            waits.append(left_s if left_s > 0 else _POLL_S)
        return max(0.0, min(waits))

    async def _look(self) -> Progress:
        info = await self._source.execute("query-migrate")
        seconds = time.monotonic() - self._started
        progress = Progress(seconds, info, destination=self._destination()).after(self._last)
        self._last = progress
        self._observe(progress)
        return progress

    async def _start_postcopy(self) -> None:
        self._wants_postcopy = False
        try:
            await self._source.execute("migrate-start-postcopy")
        except CommandFailed:
            # it may have completed this very moment, before there was anything left to switch
            progress = await self._look()
            if progress.status not in ENDED:
                raise

    async def _give_up(self, progress: Progress) -> None:
        if progress.status.startswith("postcopy"):
            fate = "it is in postcopy and cannot be cancelled: the guest is at the destination"
        else:
            await self._source.execute("migrate_cancel")
            fate = "it was cancelled; the guest goes on at the source"
        raise TimedOut(
            self._source.name, "migrate", f"not done after {self._plan.timeout_s:g} s: {fate}"
        )
