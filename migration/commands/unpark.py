"""``postcopy unpark``: give a parked VM to a QEMU, whose guest runs at once."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .causes import telling_causes
from .durations import seconds
from .incoming_qemu import (
    Prepared,
    add_arguments,
    ask_destination,
    ask_status,
    page_size_option,
)
from .interruptible import run_interruptible
from .memory import memory_peak_bytes
from .output import Output, UserError

if TYPE_CHECKING:
    from migration.park.give_back import GiveOptions, Giving

_DESCRIPTION = """\
Gives a parked VM to a QEMU started with -incoming (same machine type and devices; capability
postcopy-ram on). Its guest runs within milliseconds, whatever its RAM size: pages follow on
demand, the rest behind. Zero pages cost nothing.

Given away once: the directory then says 'given'. --clone starts a copy and keeps it parked.

When the connection breaks after the guest began to run there, it waits for its pages, and the files
still have them: migrate_recover URI at the destination, and 'unpark --resume' here, even after a
crash of this process or host. --qmp does the first, or finds that it has everything already."""

_EPILOG = """\
examples:
  qemu-system-x86_64 ... -incoming defer              then in its monitor:
      migrate_set_capability postcopy-ram on
      migrate_incoming unix:/tmp/back.sock
  postcopy unpark vm1 unix:/tmp/back.sock
  postcopy unpark vm1 unix:/tmp/back.sock --qmp unix:/tmp/qmp.sock   does both lines above itself
  postcopy unpark vm1 tcp:127.0.0.1:4444 --page-size pc.ram=2M       QEMU has 2 MiB pages
  postcopy unpark vm1 URI --record first.ws                          note which pages were asked for
  postcopy unpark vm1 URI --clone --prefetch first.ws                push those first
  postcopy unpark --resume vm1 unix:/tmp/again.sock                  go on after a cut

exit status: 0 given, 1 not (the message says who has the guest), 2 usage"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "unpark",
        help="give a parked VM to a QEMU, lazily",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a parked VM")
    parser.add_argument(
        "uri", metavar="URI", help="where the destination listens: tcp, unix, exec, fd"
    )
    add_arguments(parser)
    parser.add_argument("--clone", action="store_true", help="give a copy; it stays parked")
    parser.add_argument("--force", action="store_true", help="also when the state is not certain")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an unpark whose connection broke"
    )
    parser.add_argument(
        "--on-demand-only",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="send only what is asked for, that long",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write which pages were asked for"
    )
    parser.add_argument("--prefetch", type=Path, metavar="FILE", help="push these pages first")
    parser.add_argument("--verify", action="store_true", help="check all of RAM before")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Give one back."""
    from migration.park.give_back import Giving
    from migration.runtime.transport import connect

    out = Output(json_lines=args.json)

    def tell(event: str, data: dict[str, object]) -> None:
        if event == "MIGRATION":
            out.say(f"{data['status']}")
        elif event == "X_WARNING":
            out.say(f"warning: {data['text']}")

    with telling_causes():
        options = _options(args)
        destination = ask_destination(args, resume=args.resume)
        if args.qmp and not destination.is_complete:
            out.say(f"the destination listens at {args.uri}")
        giving = Giving(args.directory, _towards(destination, options, args), tell)
        try:
            if destination.is_complete:
                return _note_complete(out, giving, args)
            _note_paused(out, giving, args)
            channel = connect(args.uri)
            run_interruptible(lambda: giving.run(channel), giving.stop)
            return _tell(out, giving)
        finally:
            giving.close()


def _note_paused(out: Output, giving: Giving, args: argparse.Namespace) -> None:
    state = giving.manifest.run_state
    if state != "running" and not args.resume:
        out.say(
            f"note: this guest was {state} when it was parked, but a postcopy always starts it: "
            "start the destination with -S to keep it so"
        )


def _options(args: argparse.Namespace) -> GiveOptions:
    """:raises ParkError: before the destination is touched, when it may not be given."""
    from migration.park.give_back import GiveOptions, refuse_unless_allowed
    from migration.park.manifest import load_settled

    options = GiveOptions(
        page_sizes={},
        is_clone=args.clone,
        force=args.force,
        resume=args.resume,
        on_demand_only_s=args.on_demand_only,
        record=args.record,
        prefetch=args.prefetch,
        verify=args.verify,
    )
    manifest = load_settled(args.directory)
    refuse_unless_allowed(args.directory, manifest, options)
    known = {block.idstr for block in manifest.blocks}
    for name, _ in map(page_size_option, args.page_size):
        if name not in known:
            raise UserError(f"--page-size {name}: the VM has {', '.join(sorted(known))}", status=2)
    return options


def _towards(destination: Prepared, options: GiveOptions, args: argparse.Namespace) -> GiveOptions:
    from migration.runtime.transport import connect

    return replace(
        options,
        page_sizes=destination.page_sizes,
        connect_urgent=(lambda: connect(args.uri)) if destination.preempt else None,
        urgent_first=destination.preempt and destination.is_old,
        ask=lambda: ask_status(args.qmp),
    )


def _note_complete(out: Output, giving: Giving, args: argparse.Namespace) -> int:
    giving.note_complete(args.uri)
    out.emit({"result": "ok", "state": giving.manifest.state.value})
    out.say("given: the destination had all of it already, only its last word was lost")
    return 0


def _tell(out: Output, giving: Giving) -> int:
    assert giving.migration is not None
    stats = giving.migration.ram.last_statistics
    report = giving.report
    if (error := giving.record_error) is not None:
        out.say(f"warning: no record in {giving.options.record}: {error.strerror}")
    out.emit(
        {
            "result": "ok",
            "state": giving.manifest.state.value,
            "began_unix_s": time.time() - (time.monotonic_ns() - report.started_ns) / 1e9,
            "total_ms": report.total_ms(),
            "until_running_ms": giving.until_running_ms,
            "page_requests": stats["requests"],
            "pages_normal": stats["pages_normal"],
            "pages_zero": stats["pages_zero"],
            "memory_peak_bytes": memory_peak_bytes(),
        }
    )
    if giving.options.resume:
        out.say(
            f"given: the rest came in {report.total_ms()} ms; "
            f"{stats['requests']} pages were asked for"
        )
        return 0
    out.say(
        f"given: the guest could run after {giving.until_running_ms:.1f} ms, all of it was there "
        f"after {report.total_ms()} ms; {stats['requests']} pages were asked for"
    )
    return 0
