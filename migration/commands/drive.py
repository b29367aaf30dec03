"""One migration driven through QMP: settings, start, switch to postcopy, to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from guestmem.geometry import TARGET_PAGE_BYTES

from .qmp_link import CommandFailed, VMLink

ENDED = frozenset({"completed", "failed", "cancelled", "postcopy-paused"})
_POLL_S = 0.25


@dataclass(frozen=True)
class Plan:
    """What the user wants.

    :ivar postcopy_after_s: switch to postcopy so long after the start; None: precopy only.
    :ivar timeout_s: give up (and cancel, where that is still possible) after so long.
    :ivar capabilities: switched on beside those the plan needs.
    :ivar parameters: set before the start, QEMU's names and units.
    """

    uri: str
    postcopy_after_s: float | None = None
    timeout_s: float | None = None
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """What the source said at one moment.

    :ivar seconds: since the start.
    :ivar info: its ``query-migrate``.
    :ivar pages_per_s, requests_per_s: over the time since the moment before.
    """

    seconds: float
    info: Mapping[str, object]
    pages_per_s: float = 0.0
    requests_per_s: float = 0.0

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
    def eta_s(self) -> float | None:
        """Seconds to the end at the present speed; None when it cannot be told."""
        bytes_per_s = self.pages_per_s * (self.ram("page-size") or TARGET_PAGE_BYTES)
        return self.ram("remaining") / bytes_per_s if bytes_per_s > 0 else None

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
        )


class TimedOut(CommandFailed):
    """The migration did not end in the time it was given."""


Observer = Callable[[Progress], None]


async def configure(vm: VMLink, plan: Plan, *, is_source: bool) -> None:
    """Switch on what the plan needs, at one side.

    :raises CommandFailed: the VM does not offer it.
    """
    names = ["events", *plan.capabilities]
    if is_source:
        names.append("return-path")  # with it the source knows whether the destination got it all
    if plan.postcopy_after_s is not None:
        names.append("postcopy-ram")
    states = [{"capability": name, "state": True} for name in dict.fromkeys(names)]
    await vm.execute("migrate-set-capabilities", {"capabilities": states})
    if plan.parameters and is_source:
        await vm.execute("migrate-set-parameters", plan.parameters)


async def drive(source: VMLink, plan: Plan, observe: Observer) -> Progress:
    """Start the configured migration and follow it to its end (or pause).

    :param observe: called at every change of status and a few times a second.
    :returns: the last figures; ``status`` says how it ended.
    :raises TimedOut: it took too long; it was cancelled unless the guest had already moved.
    """
    await source.execute("migrate", {"uri": plan.uri})
    return await _Follower(source, plan, observe).follow()


class _Follower:
    """One migration being watched."""

    def __init__(self, source: VMLink, plan: Plan, observe: Observer) -> None:
        self._source = source
        self._plan = plan
        self._observe = observe
        self._started = time.monotonic()
        self._last: Progress | None = None
        self._wants_postcopy = plan.postcopy_after_s is not None

    async def follow(self) -> Progress:
        progress = await self._look()
        while progress.status not in ENDED:
            if self._wants_postcopy and self._left(self._plan.postcopy_after_s) <= 0:
                await self._start_postcopy()
            if self._left(self._plan.timeout_s) <= 0:
                await self._give_up(progress)
            await self._source.wait_change(self._next_wait_s())
            progress = await self._look()
        return progress

    def _left(self, limit_s: float | None) -> float:
        if limit_s is None:
            return float("inf")
        return self._started + limit_s - time.monotonic()

    def _next_wait_s(self) -> float:
        waits = [_POLL_S, self._left(self._plan.timeout_s)]
        if self._wants_postcopy:
            waits.append(self._left(self._plan.postcopy_after_s))
        return max(0.0, min(waits))

    async def _look(self) -> Progress:
        info = await self._source.execute("query-migrate")
        progress = Progress(time.monotonic() - self._started, info).after(self._last)
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
