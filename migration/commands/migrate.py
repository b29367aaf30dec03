"""``postcopy migrate``: drive the migration of a running VM, ours or a stock QEMU, through QMP."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from .output import Output, UserError

if TYPE_CHECKING:
    from .drive import Plan, Progress
    from .qmp_link import VMLink

_EPILOG = """\
The destination must be listening (--incoming URI), with the same capabilities: for postcopy it
needs postcopy-ram on. With --destination this command sets them there too, starts the listening of
a VM that waits with '--incoming defer', and at the end compares both run states.

Interrupting this command does not interrupt the migration.
Exit status: 0 completed, 1 anything else.

examples:
  precopy, a stock QEMU as well as ours:
    postcopy migrate /run/vm.qmp tcp:192.0.2.7:4444
  one second of precopy, then postcopy, watched:
    postcopy migrate src.qmp unix:mig.sock --destination dst.qmp --postcopy-after 1 --watch
  slowly, and give up after a minute:
    postcopy migrate src.qmp unix:mig.sock --set max-bandwidth=10M --timeout 60
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "migrate",
        help="drive the migration of a running VM (ours or a QEMU) through QMP",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "qmp", metavar="QMP-SOCKET", help="the source's monitor: PATH, unix:PATH or tcp:HOST:PORT"
    )
    parser.add_argument("uri", metavar="URI", help="where to: tcp:HOST:PORT, unix:PATH, ...")
    parser.add_argument(
        "--destination", metavar="QMP-SOCKET", help="the destination's monitor, if it is at hand"
    )
    parser.add_argument(
        "--postcopy-after",
        type=float,
        metavar="SECONDS",
        help="switch to postcopy so long after the start (default: precopy only)",
    )
    parser.add_argument(
        "--capability",
        action="append",
        default=[],
        metavar="NAME",
        help="also switch this capability on (may be given several times)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="parameters",
        metavar="NAME=VALUE",
        help="set a migration parameter at the source; sizes may have a suffix, plain numbers are "
        "bytes (may be given several times)",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="cancel after so long")
    parser.add_argument("--watch", action="store_true", help="show progress while it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object per line on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Migrate; 0 when it completed."""
    for name in ("postcopy_after", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1e9:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: seconds, 0 or more")
    try:
        return asyncio.run(_migrate(args, Output(json_lines=args.json)))
    except KeyboardInterrupt:
        Output(json_lines=args.json).say("no longer watching; the migration goes on")
        raise


def _plan(args: argparse.Namespace) -> Plan:
    from .drive import Plan

    return Plan(
        uri=args.uri,
        postcopy_after_s=args.postcopy_after,
        timeout_s=args.timeout,
        capabilities=tuple(args.capability),
        parameters=dict(_parameter(text) for text in args.parameters),
    )


def _parameter(text: str) -> tuple[str, object]:
    """``NAME=VALUE``, the value typed: a number or size, on/off, else a string."""
    from migration.monitor.units import parse_size, parse_switch

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--set {text}: write NAME=VALUE")
    for read in (parse_size, parse_switch):
        try:
            return name, read(value)
        except ValueError:
            continue
    return name, value


async def _migrate(args: argparse.Namespace, output: Output) -> int:
    from .drive import configure, drive
    from .progress import Watcher, summary
    from .qmp_link import VMLink

    plan = _plan(args)
    source = VMLink("source", args.qmp)
    destination = VMLink("destination", args.destination) if args.destination else None
    try:
        await source.connect()
        await configure(source, plan, is_source=True)
        if destination is not None:
            await destination.connect()
            await _prepare_destination(destination, plan)
        with Watcher(output, is_live=args.watch) as watcher:
            last = await drive(source, plan, watcher.show)
        states = await _run_states(source, destination)
        alarm = await _stop_a_second_guest(source, states, last)
    finally:
        await source.close()
        if destination is not None:
            await destination.close()
    is_ok = last.status == "completed" and alarm is None
    for line in summary(last, states):
        output.say(line)
    if alarm is not None:
        output.say(alarm)
    output.emit(
        {
            "result": "ok" if is_ok else "failed",
            "run_states": states,
            **({"alarm": alarm} if alarm else {}),
            "migration": dict(last.info),
        }
    )
    return 0 if is_ok else 1


async def _prepare_destination(destination: VMLink, plan: Plan) -> None:
    """Its capabilities; and let it listen, if it was left to us to say where."""
    from .drive import configure
    from .qmp_link import CommandFailed

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
    await destination.execute("migrate-incoming", {"uri": plan.uri})


async def _run_states(source: VMLink, destination: VMLink | None) -> dict[str, str]:
    """Whether each side's guest runs, as far as it can still be asked."""
    from .qmp_link import VMGone

    states = {}
    for vm in (source, destination):
        if vm is not None:
            try:
                states[vm.name] = str((await vm.execute("query-status"))["status"])
            except VMGone:
                states[vm.name] = "gone"
    return states


async def _stop_a_second_guest(
    source: VMLink, states: dict[str, str], last: Progress
) -> str | None:
    """One guest must run on one side only: if both do, stop the source's and say so."""
    if states.get("source") == states.get("destination") == "running":
        await source.execute("stop")
        return (
            f"ALARM: after status '{last.status}' the guest ran on both sides; "
            "the source's was stopped. Its memory differs by now: do not continue it"
        )
    return None
