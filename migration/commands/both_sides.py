"""What takes both monitors: a second look at every fault, recovery, and that one guest runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from .drive import Plan, Progress, configure
from .output import UserError
from .qmp_link import CommandFailed, VMGone, VMLink

PEEK_S = 0.25
SETTLE_S = 5.0
"""How long a VM may take from the end of a migration to its own last run state."""
PAUSE_S = 20.0
"""How long the other side may take to notice that the connection is gone."""
_PAUSED = "postcopy-paused"
_IN_POSTCOPY = ("postcopy-active", "postcopy-recover", "postcopy-recover-setup")


async def prepare_destination(destination: VMLink, plan: Plan) -> None:
    """Its capabilities; and let it listen, if it was left to us to say where."""
    info = await destination.execute("query-migrate")
    if info.get("status") in ("setup", "active"):
        # listening already: a QEMU accepts the capabilities now, ours took them at its start
        try:
            await configure(destination, plan, is_source=False)
        except CommandFailed as error:
            raise UserError(
                f"the destination listens already and refuses: {error.reason}",
                hint="start it with --incoming defer; this command then lets it listen",
            ) from None
        return
    await configure(destination, plan, is_source=False)
    if plan.wants_postcopy:
        with contextlib.suppress(CommandFailed):  # only for the figures
            states = [{"capability": "postcopy-blocktime", "state": True}]
            await destination.execute("migrate-set-capabilities", {"capabilities": states})
    await destination.execute("migrate-incoming", {"uri": plan.listen or plan.uri})


class Peek:
    """The destination's ``query-migrate`` every now and then, in a task of its own: it may be slow
    to answer, and nothing waits for it.

    :ivar info: its last answer.
    """

    def __init__(self, destination: VMLink | None) -> None:
        self.info: Mapping[str, object] = {}
        self._destination = destination
        self._task: asyncio.Task[None] | None = None

    async def _look(self) -> None:
        assert self._destination is not None
        with contextlib.suppress(VMGone, CommandFailed):
            while True:
                self.info = await self._destination.execute("query-migrate")
                await asyncio.sleep(PEEK_S)

    async def last(self) -> Mapping[str, object]:
        """One more look at the end, as far as it can still be had."""
        if self._destination is not None:
            with contextlib.suppress(VMGone, CommandFailed, TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    self.info = await self._destination.execute("query-migrate")
        return self.info

    def __enter__(self) -> Self:
        if self._destination is not None:
            self._task = asyncio.ensure_future(self._look())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()


# -- recovery -------------------------------------------------------------------------------------


async def recover(source: VMLink, destination: VMLink | None, plan: Plan) -> None:
    """From paused on both sides to a recovery under way. Without the destination's monitor it must
    be waiting at ``plan.uri`` already.

    :raises CommandFailed: one of them refused, or nobody listens.
    """
    if destination is not None:
        await _pause(destination)
        await destination.execute(
            "migrate-recover", {"uri": plan.listen or plan.uri}, oob=destination.has_oob
        )
    source.migration_events.clear()
    await source.execute("migrate", {"uri": plan.uri, "resume": True})
    await _until_begun(source)


async def _pause(vm: VMLink) -> None:
    """A side that has not noticed yet that the connection is gone is told."""
    status = (await vm.execute("query-migrate")).get("status")
    if status in _IN_POSTCOPY:
        await vm.execute("migrate-pause", oob=vm.has_oob)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PAUSE_S):
            while (await vm.execute("query-migrate")).get("status") in _IN_POSTCOPY:
                await vm.wait_change(PEEK_S)


async def _until_begun(source: VMLink) -> None:
    """A QEMU before 9.1 says ``postcopy-paused`` until it is connected; and the recovery may have
    failed before anybody could look, which only the events tell."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_S):
            while (await source.execute("query-migrate")).get("status") == _PAUSED:
                if (await source.wait_change(PEEK_S) or _PAUSED) != _PAUSED:
                    return


# -- one guest ------------------------------------------------------------------------------------


async def run_states(source: VMLink, destination: VMLink | None, status: str) -> dict[str, str]:
    """Whether each side's guest runs, as far as it can still be asked.

    :param status: how it ended: a source that failed decides a moment later whether its guest goes
        on.
    """
    states = {}
    for vm in (source, destination):
        if vm is not None:
            try:
                states[vm.name] = await _settled_state(vm, may_change=status != "completed")
            except VMGone:
                states[vm.name] = "gone"
    return states


async def _settled_state(vm: VMLink, *, may_change: bool) -> str:
    state = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_S):
            while True:
                state = str((await vm.execute("query-status"))["status"])
                if not may_change or state != "finish-migrate":
                    return state
                await asyncio.sleep(0.05)
    return state


async def stop_a_second_guest(source: VMLink, states: dict[str, str], status: str) -> str | None:
    """One guest must run on one side only: if both do, stop the source's and say so. The
    destination's has all of the memory and went on from there."""
    if status == _PAUSED or not states.get("source") == states.get("destination") == "running":
        return None
    await source.execute("stop")
    return (
        f"ALARM: after status '{status}' the guest ran on both sides; "
        "the source's was stopped. Its memory differs by now: do not continue it"
    )


def unheard(last: Progress) -> str | None:
    """The destination has everything, but the source did not hear so."""
    if not last.is_complete_there or last.status in ("completed", "failed", "cancelled"):
        return None
    return (
        f"the destination has everything, but its last word never came: the source stays in "
        f"'{last.status}' and its guest stopped. End it: 'quit' in its monitor"
    )


def may_be_nowhere(last: Progress, states: Mapping[str, str]) -> str | None:
    """A precopy failed, the source does not run its guest, and the destination neither, as far as
    it can be asked."""
    is_held = last.status == "failed" and states.get("source") == "finish-migrate"
    if not is_held or states.get("destination") == "running":
        return None
    return (
        "the source gave its guest away, and the word that starts it may have been lost: if it "
        "does not run at the destination, 'postcopy migrate QMP-SOCKET --take-back --destination "
        "QMP-SOCKET' lets it go on at the source"
    )


async def take_back(source: VMLink, destination: VMLink | None) -> None:
    """Let a guest go on at the source whose precopy lost its last word.

    :param destination: asked whether it runs the guest; None: the user knows that it does not.
    :raises UserError: it does, or may still. :raises CommandFailed: there is no such guest.
    """
    if destination is not None:
        status = str((await destination.execute("query-migrate")).get("status", "none"))
        state = str((await destination.execute("query-status"))["status"])
        if (status, state) != ("failed", "inmigrate"):
            raise UserError(
                f"the destination does not say that it never ran the guest: its migration is "
                f"'{status}', its guest '{state}'",
                hint="what failed there is 'failed' and 'inmigrate'; anything else may run it",
            )
    try:
        await source.execute("x-take-back", {"not-running-elsewhere": True})
    except CommandFailed as error:
        if "has not been found" in error.reason:
            raise UserError("the source is a stock QEMU, which cannot take a guest back") from None
        raise


async def keep_paused(
    destination: VMLink | None, states: dict[str, str], before: str
) -> str | None:
    """RUN starts a guest whatever its state was: one that stood at the source is stopped again."""
    is_started = before in ("paused", "prelaunch", "suspended")
    if destination is None or not is_started or states.get("destination") != "running":
        return None
    await destination.execute("stop")
    return (
        f"the guest was '{before}' at the source, and postcopy starts it: "
        "it was stopped at the destination"
    )
