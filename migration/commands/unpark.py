"""``postcopy unpark``: give a parked VM to a QEMU, whose guest runs at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .causes import telling_causes
from .output import Output, UserError

if TYPE_CHECKING:
    from migration.park.give_back import GiveOptions, Giving

_DESCRIPTION = """\
Gives a parked VM to a QEMU started with -incoming (same machine type and devices; capability
postcopy-ram on). Its guest runs within milliseconds, whatever its RAM size: pages follow on demand, the
rest behind. Zero pages cost nothing.

Given away once: the directory then says 'given'. --clone starts a copy and keeps it parked."""

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
    parser.add_argument(
        "--qmp", metavar="SOCKET", help="the destination's QMP socket: prepare it too"
    )
    parser.add_argument(
        "--page-size", action="append", default=[], metavar="BLOCK=SIZE",
        help="host page size of a block at the destination, e.g. pc.ram=2M",
    )  # fmt: skip
    parser.add_argument("--clone", action="store_true", help="give a copy; it stays parked")
    parser.add_argument("--force", action="store_true", help="also when the state is not certain")
    parser.add_argument("--on-demand-only", type=float, default=0.0, metavar="SECONDS")
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

    with telling_causes():
        giving = Giving(args.directory, _options(args), tell)
        try:
            if args.qmp:
                _prepare(args.qmp, args.uri, out)
            if giving.manifest.run_state != "running":
                out.say(
                    f"note: this guest was {giving.manifest.run_state} when it was parked, but RUN "
                    "starts it: start the destination with -S to keep it so"
                )
            giving.run(connect(args.uri))
            return _tell(out, giving)
        finally:
            giving.close()


def _options(args: argparse.Namespace) -> GiveOptions:
    from migration.park.give_back import GiveOptions

    return GiveOptions(
        page_sizes=dict(page_size_option(text) for text in args.page_size),
        is_clone=args.clone,
        force=args.force,
        on_demand_only_s=args.on_demand_only,
        record=args.record,
        prefetch=args.prefetch,
        verify=args.verify,
    )


def page_size_option(text: str) -> tuple[str, int]:
    """``BLOCK=SIZE`` of ``--page-size``; :raises UserError: not of that form."""
    name, equals, size = text.rpartition("=")
    units = {"K": 10, "M": 20, "G": 30}
    number, unit = (size[:-1], size[-1].upper()) if size[-1:].isalpha() else (size, "")
    if not equals or not name or not number.isdigit() or (unit and unit not in units):
        raise UserError(f"--page-size {text}: expected BLOCK=SIZE, e.g. pc.ram=2M", status=2)
    return name, int(number) << units.get(unit, 0)


def _prepare(qmp: str, uri: str, out: Output) -> None:
    """Capability and listening at the destination, through its monitor."""
    import asyncio

    from .qmp_link import VMLink

    async def prepare() -> None:
        link = VMLink("the destination", qmp)
        await link.connect()
        try:
            wanted = [{"capability": "postcopy-ram", "state": True}]
            await link.execute("migrate-set-capabilities", {"capabilities": wanted})
            await link.execute("migrate-incoming", {"uri": uri})
        finally:
            await link.close()

    asyncio.run(prepare())
    out.say(f"the destination listens at {uri}")


def _tell(out: Output, giving: Giving) -> int:
    assert giving.migration is not None
    stats = giving.migration.ram.last_statistics
    report = giving.report
    out.emit(
        {
            "result": "ok",
            "state": giving.manifest.state.value,
            "total_ms": report.total_ms(),
            "until_running_ms": giving.until_running_ms,
            "page_requests": stats["requests"],
            "pages_normal": stats["pages_normal"],
            "pages_zero": stats["pages_zero"],
        }
    )
    out.say(
        f"given: the guest could run after {giving.until_running_ms:.1f} ms, all of it was there after "
        f"{report.total_ms()} ms; {stats['requests']} pages were asked for"
    )
    return 0
