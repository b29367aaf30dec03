"""What a verb that gives a guest to a QEMU asks of its monitor: prepare it, and learn about it."""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from guestmem.geometry import TARGET_PAGE_BYTES

from .output import UserError
from .qmp_link import CommandFailed, VMLink

SETTLE_TIMEOUT_S = 20.0
_POLL_S = 0.2
_IN_FLIGHT = frozenset({"setup", "active", "device", "postcopy-device", "postcopy-active"})
_UNITS = {"": 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30}
# "  pc.ram    4 KiB  0x000 0x...": the name may hold spaces, the size never does.
_RAMBLOCK = re.compile(r"^\s*(?P<name>\S.*?)\s+(?P<number>\d+)\s*(?P<unit>[KMG]iB|B)\s+0x")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a destination is like.

    :ivar page_sizes: host page size per RAM block, bytes.
    :ivar preempt: capability postcopy-preempt is on.
    :ivar is_old: its preempt channel is to be opened and ended as QEMU 7.2 wants it.
    :ivar is_complete: it was to be recovered, and has had everything already.
    """

    page_sizes: Mapping[str, int] = field(default_factory=dict)
    preempt: bool = False
    is_old: bool = False
    is_complete: bool = False


def parse_ramblocks(text: str) -> dict[str, int]:
    """Host page sizes by block from the HMP command ``info ramblock``, bytes."""
    sizes = {}
    for line in text.splitlines():
        if match := _RAMBLOCK.match(line):
            sizes[match["name"]] = int(match["number"]) << _UNITS[match["unit"]]
    return sizes


def prepare_incoming(qmp: str, uri: str, *, resume: bool) -> Prepared:
    """Have the QEMU with this monitor listen at ``uri`` for a postcopy, or for its recovery.

    :raises UserError: it cannot be reached, or refuses.
    """
    return asyncio.run(_prepare(qmp, uri, resume))


async def _prepare(qmp: str, uri: str, resume: bool) -> Prepared:
    async with _destination(qmp) as link:
        if resume:
            if await _settled_status(link) == "completed":
                return Prepared(is_complete=True)
            await link.execute("migrate-recover", {"uri": uri})
        else:
            await _listen(link, uri)
        version = (await link.execute("query-version"))["qemu"]
        return Prepared(
            await _page_sizes(link), await _has_preempt(link), is_old=version["major"] < 8
        )


def ask_status(qmp: str | None) -> str | None:
    """How far the migration of the VM with this monitor is, once that is settled; None: not told.
    Sleeps up to half a minute; any thread without an event loop."""
    if qmp is None:
        return None
    try:
        return asyncio.run(_ask_status(qmp))
    except UserError:
        return None


async def _ask_status(qmp: str) -> str:
    async with _destination(qmp) as link:
        return await _settled_status(link)


@asynccontextmanager
async def _destination(qmp: str) -> AsyncIterator[VMLink]:
    """Its monitor. :raises UserError: it cannot be reached."""
    link = VMLink("destination", qmp)
    await link.connect()
    try:
        yield link
    finally:
        await link.close()


async def _settled_status(link: VMLink) -> str:
    """A connection that broke may be news to the other end still: wait until it took note."""
    loop = asyncio.get_running_loop()
    until = loop.time() + SETTLE_TIMEOUT_S
    status = await _status(link)
    while status in _IN_FLIGHT and (left := until - loop.time()) > 0:
        await link.wait_change(min(left, _POLL_S))  # events come only with that capability
        status = await _status(link)
    return status


async def _status(link: VMLink) -> str:
    return str((await link.execute("query-migrate")).get("status"))


async def _listen(link: VMLink, uri: str) -> None:
    wanted = [{"capability": "postcopy-ram", "state": True}]
    try:
        await link.execute("migrate-set-capabilities", {"capabilities": wanted})
        await link.execute("migrate-incoming", {"uri": uri})
    except CommandFailed as error:
        state = await link.execute("query-status")
        if state.get("status") == "inmigrate" and "already" in error.reason:
            return  # started with -incoming URI: it listens
        if state.get("status") != "inmigrate":
            raise UserError(
                f"the destination is {state.get('status')}, it waits for no guest",
                hint="start it with -incoming defer",
            ) from None
        raise


async def _has_preempt(link: VMLink) -> bool:
    answer = await link.execute("query-migrate-capabilities")
    return any(each["capability"] == "postcopy-preempt" and each["state"] for each in answer)


async def _page_sizes(link: VMLink) -> dict[str, int]:
    """From HMP: QMP's ``query-memdev`` knows backends, but not what their blocks are called."""
    try:
        text = await link.execute("human-monitor-command", {"command-line": "info ramblock"})
    except CommandFailed:
        return {}  # no such command there (one of ours): target pages
    return parse_ramblocks(str(text))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every verb that gives a guest to a QEMU takes."""
    parser.add_argument(
        "--qmp",
        metavar="SOCKET",
        help="the destination's QMP socket: prepare it, and learn its page sizes and capabilities",
    )
    parser.add_argument(
        "--page-size",
        action="append",
        default=[],
        metavar="BLOCK=SIZE",
        help="host page size of a block at the destination, e.g. pc.ram=2M",
    )
    parser.add_argument(
        "--preempt",
        choices=("8.0", "7.2"),
        nargs="?",
        const="8.0",
        help="the destination has capability postcopy-preempt; 7.2: it is a QEMU of 7.2",
    )


def ask_destination(args: argparse.Namespace, *, resume: bool) -> Prepared:
    """What the user said about the destination, and what it says itself when there is ``--qmp``.

    :raises UserError: it cannot be reached, refuses, or contradicts.
    """
    from migration.runtime.transport import is_multi_channel

    if args.uri.startswith("file:"):
        raise UserError(f"{args.uri} is one-way: a postcopy needs answers", hint="tcp or unix")
    given = dict(page_size_option(text) for text in args.page_size)
    found = Prepared()
    if args.qmp:
        found = prepare_incoming(args.qmp, args.uri, resume=resume)
    prepared = Prepared(
        merge_page_sizes(given, found.page_sizes),
        preempt=found.preempt or args.preempt is not None,
        is_old=found.is_old if args.qmp else args.preempt == "7.2",
        is_complete=found.is_complete,
    )
    if prepared.preempt and not is_multi_channel(args.uri):
        raise UserError(f"{args.uri} carries one channel; preempt needs tcp or unix")
    return prepared


def page_size_option(text: str) -> tuple[str, int]:
    """``BLOCK=SIZE`` of ``--page-size``; :raises UserError: not of that form."""
    name, equals, size = text.rpartition("=")
    units = {"K": 10, "M": 20, "G": 30}
    number, unit = (size[:-1], size[-1].upper()) if size[-1:].isalpha() else (size, "")
    if not equals or not name or not number.isdigit() or (unit and unit not in units):
        raise UserError(f"--page-size {text}: expected BLOCK=SIZE, e.g. pc.ram=2M", status=2)
    length = int(number) << units.get(unit, 0)
    if length < TARGET_PAGE_BYTES or length & (length - 1):
        raise UserError(f"--page-size {text}: a page size is a power of two, 4K or more", status=2)
    return name, length


def merge_page_sizes(given: Mapping[str, int], learned: Mapping[str, int]) -> dict[str, int]:
    """What the user said and what the destination says.

    :raises UserError: they differ: the destination would refuse what the user said.
    """
    for name, length in given.items():
        if learned and learned.get(name, length) != length:
            raise UserError(
                f"--page-size {name}={length >> 10}K, but the destination's block has pages of "
                f"{learned[name] >> 10}K",
                hint="leave --page-size out: the destination was asked",
            )
    return {**learned, **given}
