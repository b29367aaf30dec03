"""The options that shape a toy VM, for ``run`` and ``demo``. QEMU's spelling where it has one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from migration.monitor.units import parse_size

from .memory_options import add_memory_options, memory_arguments, memory_plan

if TYPE_CHECKING:
    from migration.toyvm import ToyOptions
    from migration.wire.compat import CompatProperty

WORKLOADS = ("seq", "random", "zipf", "chase")
VCPUS = ("thread", "kvm")
MACHINES = ("toy-1.1", "toy-1.0", "none")
TRACKERS = ("auto", "wp-async", "wp-sync", "kvm-log", "kvm-ring")


def size(text: str) -> int:
    """argparse type: bytes, with an optional suffix."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def ram_size(text: str) -> int:
    """argparse type of ``-m``: ``512M``, QEMU's ``size=512M``, plain numbers are MiB."""
    try:
        return parse_size(text.removeprefix("size="), default_unit="M")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def vcpu_count(text: str) -> int:
    """argparse type of ``--smp``: ``4`` or QEMU's ``cpus=4``."""
    number = text.removeprefix("cpus=")
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of vCPUs")
    return int(number)


def global_property(text: str) -> CompatProperty:
    """argparse type of ``-global``: ``DEVICE.PROPERTY=VALUE``."""
    from migration.wire.compat import CompatProperty

    try:
        return CompatProperty.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """argparse type: a part of a whole, ``0`` to ``1`` or ``0%%`` to ``100%%``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: write 0.5 or 50%")
    return value


class AccelAction(argparse.Action):
    """QEMU's ``-accel kvm[,dirty-ring-size=N]``; ``thread`` is ours."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        name, *properties = str(values).removeprefix("accel=").split(",")
        if name not in VCPUS:
            raise argparse.ArgumentError(self, f"{name!r}: one of {', '.join(VCPUS)} please")
        namespace.vcpu, namespace.dirty_ring_size = name, 0
        for text in properties:
            key, _, value = text.partition("=")
            if key != "dirty-ring-size" or not value.isdecimal():
                raise argparse.ArgumentError(self, f"{text!r}: dirty-ring-size=N is what there is")
            namespace.dirty_ring_size = int(value)


def add_shape_options(parser: argparse.ArgumentParser, *, ram: str) -> None:
    """Options both sides of a migration must agree on, and the workload.

    :param ram: default of ``-m``, as the user would write it.
    """
    group = parser.add_argument_group("machine")
    group.add_argument(
        "-m",
        dest="ram_bytes",
        type=ram_size,
        default=ram_size(ram),
        metavar="SIZE",
        help=f"guest RAM; plain numbers are MiB (default {ram})",
    )
    group.add_argument(
        "--smp", "-smp", type=vcpu_count, default=1, metavar="N", help="vCPUs (default 1)"
    )
    group.add_argument(
        "--vcpu",
        choices=VCPUS,
        default="thread",
        help="who the vCPUs are: native threads, which work everywhere, or KVM's (default thread)",
    )
    add_memory_options(group)
    group.add_argument(
        "--accel",
        "-accel",
        action=AccelAction,
        metavar="thread|kvm[,dirty-ring-size=N]",
        help="the same in QEMU's words; N entries, a power of two from 1024 to 65536, make KVM's "
        "dirty ring take the place of its dirty log",
    )
    group.add_argument(
        "--dirty-tracker",
        choices=TRACKERS,
        default="auto",
        help="who finds out what the guest wrote (default auto: what this host does best; kvm-ring "
        "makes a ring of 4096 entries if --accel asks for none)",
    )
    parser.set_defaults(dirty_ring_size=0)
    group.add_argument(
        "--fill-share",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="part of RAM that is not zero at the start (default 100%%)",
    )
    load = parser.add_argument_group("workload")
    load.add_argument(
        "--workload",
        choices=WORKLOADS,
        default="random",
        help="the order in which the vCPUs touch pages (default random)",
    )
    load.add_argument(
        "--working-set", type=size, metavar="SIZE", help="how much RAM they touch (default all)"
    )
    load.add_argument(
        "--rate",
        type=int,
        default=0,
        metavar="OPS",
        help="touches a second, all vCPUs together (default 0: as fast as they can)",
    )
    load.add_argument(
        "--write-share",
        type=share,
        default=None,
        metavar="SHARE",
        help="part of the touches that write (default 50%%; machine none: 0)",
    )
    load.add_argument("--seed", type=int, default=1, metavar="N", help="of contents and accesses")


def shape_arguments(args: argparse.Namespace) -> list[str]:
    """The same options as words, for a child process."""
    words = ["-m", f"{args.ram_bytes}B", "--smp", str(args.smp), "--vcpu", args.vcpu]
    words += [*memory_arguments(args), "--workload", args.workload]
    words += ["--fill-share", str(args.fill_share)]
    if args.dirty_ring_size:
        words += ["--accel", f"{args.vcpu},dirty-ring-size={args.dirty_ring_size}"]
    words += ["--dirty-tracker", args.dirty_tracker]
    words += ["--rate", str(args.rate), "--seed", str(args.seed)]
    if args.working_set is not None:
        words += ["--working-set", f"{args.working_set}B"]
    if args.write_share is not None:
        words += ["--write-share", str(args.write_share)]
    return words


def toy_options(args: argparse.Namespace) -> ToyOptions:
    """The machine ``run`` was asked for. :raises migration.toyvm.OptionError: it cannot be."""
    from migration.toyvm import ToyOptions, TrackerChoice, VCpuKind, Workload
    from migration.toyvm.options import main_block

    defaults = ToyOptions()
    is_bare = args.machine == "none"
    write_share = args.write_share
    if write_share is None:
        write_share = 0.0 if is_bare else defaults.write_share
    plan = memory_plan(args, main_block(is_bare=is_bare))
    return ToyOptions(
        ram_bytes=args.ram_bytes,
        smp=args.smp,
        machine_type=args.machine,
        uuid=args.uuid,
        extra_blocks=plan.extra_blocks,
        backends=plan.backends,
        vcpu=VCpuKind(args.vcpu),
        workload=Workload(args.workload),
        working_set_bytes=args.working_set,
        rate=args.rate,
        write_share=write_share,
        fill_share=args.fill_share,
        seed=args.seed,
        disk_bytes=args.disk,
        disk_path=args.disk_path,
        global_properties=tuple(args.global_properties),
        dirty_ring_size=args.dirty_ring_size,
        dirty_tracker=TrackerChoice(args.dirty_tracker),
        incoming=args.incoming is not None or args.loadvm is not None,
    )
