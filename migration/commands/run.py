"""``postcopy run``: a toy VM in this process, with a monitor, ready to be migrated."""

from __future__ import annotations

import argparse
from uuid import UUID

from .output import Output, UserError
from .vm_options import MACHINES, add_shape_options, global_property, size

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
  two RAM blocks, 2 MiB pages of node 0 and small ones, all there from the start:
    postcopy run -m 512M -M toy-1.1,memory-backend=a --monitor stdio \\
      --object memory-backend-memfd,id=a,size=512M,hugetlb=on,host-nodes=0,policy=bind \\
      --object memory-backend-ram,id=b,size=64M,prealloc=on,prealloc-threads=2
  the newest machine, without what toy-1.0 does not know:
    postcopy run --global toy-cpu.x-clock=off --global toy-disk-state.x-label=off
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
    _add_policy_option(parser)
    parser.set_defaults(func=run)


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine, continued")
    group.add_argument(
        "-M",
        "--machine",
        "-machine",
        action=_Machine,
        default=MACHINES[0],
        metavar="TYPE[,memory-backend=ID]",
        help=f"machine type: {', '.join(MACHINES)}; 'none' is QEMU's: RAM and no devices "
        "(default %(default)s)",
    )
    group.add_argument(
        "--global",
        "-global",
        dest="global_properties",
        type=global_property,
        action="append",
        default=[],
        metavar="DEVICE.PROPERTY=VALUE",
        help="set a property on every device of a kind, after those of the machine type "
        "(may be given several times)",
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


class _Machine(argparse.Action):
    """QEMU's ``-machine TYPE[,memory-backend=ID]``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        name, *options = str(values).removeprefix("type=").split(",")
        if name not in MACHINES:
            raise argparse.ArgumentError(self, f"{name!r}: one of {', '.join(MACHINES)}")
        namespace.machine = name
        for option in options:
            key, _, value = option.partition("=")
            if key != "memory-backend" or not value:
                raise argparse.ArgumentError(self, f"{option!r}: only memory-backend=ID is known")
            namespace.memory_backend = value


def _add_policy_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        metavar="MODULE:CLASS",
        help="your own migration policy, or FILE.py:CLASS: when to switch over, what to push next",
    )


def _add_monitor_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("monitor and process")
    group.add_argument("--name", "-name", metavar="NAME", help="a name, for query-name and texts")
    group.add_argument(
        "--uuid",
        "-uuid",
        type=UUID,
        metavar="UUID",
        help="of the VM: capability validate-uuid at the source keeps it from going elsewhere",
    )
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
