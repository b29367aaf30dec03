"""``postcopy run``: a toy VM in this process, with a monitor, ready to be migrated."""

from __future__ import annotations

import argparse

from .output import Output, UserError
from .vm_options import MACHINES, add_shape_options, share, size

_EPILOG = """\
Every option may be written with one dash too where QEMU does (-incoming, -qmp, -smp, -M ...).
The process ends at 'quit', SIGINT, SIGTERM or SIGHUP; a second signal ends it at once. Like a QEMU,
a VM whose incoming migration fails ends with status 1 (see 'exit-on-error' of migrate-incoming).

examples:
  a VM and a monitor for it, on this terminal:
    postcopy run -m 512M --smp 2 --monitor stdio
  a live postcopy migration by hand (three terminals):
    postcopy run -m 512M --incoming defer --qmp unix:dst.qmp
    postcopy run -m 512M --qmp unix:src.qmp
    postcopy migrate src.qmp unix:mig.sock --postcopy-after 1 --destination dst.qmp
  save the VM, and start it again from there:
    postcopy run -m 512M --snapshot-dir . --monitor stdio          (savevm one, quit)
    postcopy run -m 512M --snapshot-dir . --monitor stdio --loadvm one
  RAM only, to or from a stock QEMU ('qemu-system-x86_64 -M none -m 128 ...'):
    postcopy run -M none -m 128M --incoming defer --monitor stdio
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "run",
        help="a toy VM in this process, with a monitor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    add_shape_options(parser, ram="256M")
    _add_machine_options(parser)
    _add_monitor_options(parser)
    parser.set_defaults(func=run)


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine, continued")
    group.add_argument(
        "-M",
        "--machine",
        "-machine",
        choices=MACHINES,
        default=MACHINES[0],
        help="machine type; 'none' is QEMU's: RAM and no devices (default %(default)s)",
    )
    group.add_argument(
        "--mem-path",
        "-mem-path",
        metavar="PATH",
        help="guest RAM in a file at PATH, or a nameless one if PATH is a directory",
    )
    group.add_argument(
        "--mem-prealloc",
        "-mem-prealloc",
        action="store_true",
        help="touch all of RAM at the start, so that a lack of it shows then",
    )
    group.add_argument(
        "--hugepage-size",
        type=size,
        default=2 << 20,
        metavar="SIZE",
        help="page size of --backing hugetlb (default 2M)",
    )
    group.add_argument(
        "--fill-share",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="part of RAM that is not zero at the start (default 100%%)",
    )
    group.add_argument(
        "--disk", type=size, default=0, metavar="SIZE", help="a block disk of SIZE (default none)"
    )
    group.add_argument("--disk-path", metavar="PATH", help="the file behind the disk")
    group.add_argument(
        "--incoming",
        "-incoming",
        metavar="URI|defer",
        help="wait for a migration on URI, or for 'migrate-incoming'",
    )
    group.add_argument(
        "--loadvm",
        "-loadvm",
        metavar="NAME",
        help="start with a snapshot: NAME in the snapshot directory, or file:PATH[,offset=N]",
    )
    group.add_argument(
        "--snapshot-dir", metavar="DIR", help="where savevm, loadvm and delvm keep snapshots"
    )
    group.add_argument(
        "-S", dest="start_paused", action="store_true", help="do not start the guest: 'cont' does"
    )


def _add_monitor_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("monitor and process")
    group.add_argument("--name", "-name", metavar="NAME", help="a name, for query-name and texts")
    group.add_argument(
        "--qmp",
        "-qmp",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a QMP server on unix:PATH or tcp:HOST:PORT (may be given several times)",
    )
    group.add_argument(
        "--monitor",
        "-monitor",
        action="append",
        default=[],
        metavar="stdio|ADDRESS",
        help="an HMP console on this terminal, or on unix:PATH",
    )
    group.add_argument(
        "--run-with",
        "-run-with",
        metavar="exit-with-parent=on",
        choices=("exit-with-parent=on", "exit-with-parent=off"),
        help="end when the process that started this one ends",
    )
    group.add_argument("--json", action="store_true", help="one JSON object per event on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the VM until something ends it; returns the exit status."""
    if args.monitor.count("stdio") > 1:
        raise UserError("--monitor stdio: there is only one terminal")
    if args.loadvm is not None and args.incoming is not None:
        raise UserError("--loadvm and --incoming both say where the guest comes from: give one")
    if args.json and "stdio" in args.monitor:
        raise UserError(
            "--json and --monitor stdio both want stdout", hint="--monitor unix:PATH with --json"
        )
    from .vm_process import run_vm  # imports the C extensions

    return run_vm(args, Output(json_lines=args.json))
