"""``postcopy migrate``: drive the migration of a running VM, ours or a stock QEMU, through QMP."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .output import Output, UserError

if TYPE_CHECKING:
    from .drive import Plan, Progress
    from .qmp_link import VMLink

STATUS_PAUSED, STATUS_ALARM = 3, 4
RETRY_S = 1.0

_EPILOG = """\
The destination must be listening (--incoming URI), with the same capabilities: for postcopy it
needs postcopy-ram on. With --destination this command sets them there too, starts the listening of
a VM that waits with '--incoming defer', and at the end compares both run states.

A destination of ours listens beyond the loopback only when told so in words: give it the address
with --listen tcp:ADDRESS:PORT,allow-remote=on.

Interrupting this command does not interrupt the migration.
Exit status: 0 completed, 1 not (the guest stays at the source, or is lost with a failed
destination), 2 wrong use, 3 paused in postcopy (--resume goes on), 4 the guest ran on both sides
and the source's was stopped.

examples:
  precopy, a stock QEMU as well as ours:
    postcopy migrate /run/vm.qmp tcp:192.0.2.7:4444
  one second of precopy, then postcopy, watched:
    postcopy migrate src.qmp unix:mig.sock --destination dst.qmp --postcopy-after 1 --watch
  the network broke in postcopy: go on over a new connection
    postcopy migrate src.qmp unix:mig2.sock --destination dst.qmp --resume --watch
  the same by itself, up to ten times
    postcopy migrate src.qmp unix:mig.sock --destination dst.qmp --postcopy-after 1 --retries 10
  a precopy lost its last word: the guest runs nowhere, the destination says 'failed'
    postcopy migrate src.qmp --take-back --destination dst.qmp
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
    parser.add_argument(
        "uri", metavar="URI", nargs="?", help="where to: tcp:HOST:PORT, unix:PATH, ..."
    )
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
        "--postcopy-if-not-converged-within",
        type=float,
        metavar="SECONDS",
        help="from so long after the start on, switch to postcopy once what is left does not fit "
        "the downtime limit",
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
        help="set a migration parameter at the source, one that both ends must agree on "
        "(multifd-channels) also at the destination; sizes may have a suffix, plain numbers are "
        "bytes (may be given several times)",
    )
    parser.add_argument(
        "--listen",
        metavar="URI",
        help="where the destination is told to listen, when that is spelt differently there",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a postcopy migration that is paused; without --destination the other side "
        "must be waiting (migrate-recover)",
    )
    parser.add_argument(
        "--take-back",
        action="store_true",
        help="instead of migrating: the guest of a failed precopy, whose last word was lost, goes "
        "on at the source; with --destination only if that says it never ran it, without on your "
        "word that it does not run there",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=0,
        metavar="COUNT",
        help="go on by itself so many times after a pause (default 0: say that it is paused)",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="cancel after so long")
    parser.add_argument("--watch", action="store_true", help="show progress while it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object per line on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Migrate; 0 when it completed."""
    for name in ("postcopy_after", "postcopy_if_not_converged_within", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1e9:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: seconds, 0 or more")
    if args.listen is not None and args.destination is None:
        raise UserError("--listen is told to the destination: --destination says which", status=2)
    begins = (args.postcopy_after, args.postcopy_if_not_converged_within)
    if args.resume and (begins != (None, None) or args.capability):
        raise UserError("--resume goes on as it was begun: leave out what starts one", status=2)
    if args.take_back:
        if args.uri is not None or args.resume or args.capability or begins != (None, None):
            raise UserError(
                "--take-back migrates nothing: only --destination goes with it", status=2
            )
        return asyncio.run(_take_back(args, Output(json_lines=args.json)))
    if args.uri is None:
        raise UserError("where to? give the URI the destination listens on", status=2)
    try:
        return asyncio.run(_migrate(args, Output(json_lines=args.json)))
    except KeyboardInterrupt:
        Output(json_lines=args.json).say("no longer watching; the migration goes on")
        raise


def _plan(args: argparse.Namespace) -> Plan:
    from .drive import Plan

    return Plan(
        uri=args.uri,
        listen=args.listen,
        resume=args.resume,
        postcopy_after_s=args.postcopy_after,
        converge_within_s=args.postcopy_if_not_converged_within,
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
    from .both_sides import Peek, prepare_destination, recover, run_states
    from .drive import configure, drive
    from .progress import Watcher
    from .qmp_link import VMLink

    plan = _plan(args)
    source = VMLink("source", args.qmp)
    destination = VMLink("destination", args.destination) if args.destination else None
    try:
        await source.connect()
        if destination is not None:
            await destination.connect()
        before = str((await source.execute("query-status"))["status"])
        if plan.resume:
            await recover(source, destination, plan)
        else:
            await configure(source, plan, is_source=True)
            if destination is not None:
                await prepare_destination(destination, plan)
        with Watcher(output, is_live=args.watch) as watcher, Peek(destination) as peek:
            last = await drive(
                source,
                plan,
                watcher.show,
                on_pause=_Retry(args.retries, source, destination, plan, watcher.note),
                destination=lambda: peek.info,
            )
            last = replace(last, destination=await peek.last())
        states = await run_states(source, destination, last.status)
        return await _conclude(output, last, states, before, source, destination)
    finally:
        await source.close()
        if destination is not None:
            await destination.close()


async def _take_back(args: argparse.Namespace, output: Output) -> int:
    from .both_sides import run_states, take_back
    from .qmp_link import VMLink

    source = VMLink("source", args.qmp)
    destination = VMLink("destination", args.destination) if args.destination else None
    try:
        await source.connect()
        if destination is not None:
            await _connect_to_ask(destination)
        await take_back(source, destination)
        states = await run_states(source, destination, "completed")
    finally:
        await source.close()
        if destination is not None:
            await destination.close()
    output.say(f"taken back: the guest is '{states['source']}' at the source")
    output.emit({"result": "ok", "run_states": states})
    return 0


async def _connect_to_ask(destination: VMLink) -> None:
    """:raises UserError: it does not answer, which does not yet mean that nothing runs there."""
    try:
        await destination.connect()
    except UserError as error:
        raise UserError(
            str(error),
            hint="make sure that its process is gone, and only then leave out --destination",
        ) from None


class _Retry:
    """Gets a paused migration going again, a limited number of times."""

    def __init__(
        self,
        tries: int,
        source: VMLink,
        destination: VMLink | None,
        plan: Plan,
        note: Callable[[str], None],
    ) -> None:
        self._tries = tries
        self._source, self._destination, self._plan = source, destination, plan
        self._note = note

    async def __call__(self, progress: Progress) -> bool:
        from .both_sides import recover
        from .qmp_link import CommandFailed

        while self._tries > 0:
            self._tries -= 1
            cause = str(progress.info.get("error-desc", "the connection was lost"))
            self._note(f"paused: {cause}; trying to go on")
            try:
                await recover(self._source, self._destination, self._plan)
            except CommandFailed as error:
                self._note(str(error))
                await asyncio.sleep(RETRY_S)
                continue
            return True
        return False


async def _conclude(
    output: Output,
    last: Progress,
    states: dict[str, str],
    before: str,
    source: VMLink,
    destination: VMLink | None,
) -> int:
    """Look after the guests, say how it ended; the exit status."""
    from .both_sides import keep_paused, may_be_nowhere, stop_a_second_guest, unheard
    from .progress import summary

    alarm = await stop_a_second_guest(source, states, last.status)
    missed = unheard(last)
    nowhere = may_be_nowhere(last, states)
    is_ok = (last.status == "completed" or missed is not None) and alarm is None
    note = await keep_paused(destination, states, before) if alarm is None else None
    for line in summary(last, states):
        output.say(line)
    if last.status == "postcopy-paused" and missed is None:
        output.say(
            "paused, nothing is lost: the same command with --resume goes on, over a new connection"
        )
    for text in (alarm, missed, nowhere, note):
        if text is not None:
            output.say(text)
    output.emit(
        {
            "result": "ok" if is_ok else "failed",
            "run_states": states,
            **({"alarm": alarm} if alarm else {}),
            **({"note": told} if (told := missed or nowhere or note) else {}),
            "migration": dict(last.info),
            **({"destination": dict(last.destination)} if last.destination else {}),
        }
    )
    if alarm is not None:
        return STATUS_ALARM
    if last.status == "postcopy-paused" and missed is None:
        return STATUS_PAUSED
    return 0 if is_ok else 1
