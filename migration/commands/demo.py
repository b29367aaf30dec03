"""``postcopy demo``: two processes here, one toy VM, live postcopy, figures at the end."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .memory_options import memory_plan
from .output import Output, UserError
from .vm_options import add_shape_options, shape_arguments

if TYPE_CHECKING:
    from .demo_report import DemoRun
    from .drive import Plan, Progress
    from .qmp_link import VMLink

_READY_S = 120.0
_POSTCOPY_AFTER_S = 0.5
_MIGRATION_S = 300.0
_LAG_S = 10.0
_LOOK_S = 0.1
_EPILOG = """\
A toy VM runs in one process; a second one takes it over while it runs. Its vCPUs go on at the
destination within milliseconds, before their memory is there: each touch of a missing page is a
page fault that is answered over the return path, while the rest streams in behind. At the end every
page is checked against what the guest's own log says it must hold.

Exit status: 0 if the memory is intact and all went well, 1 otherwise.
Works without root where the kernel lets users handle faults (thread vCPUs); 'postcopy probe' tells.

examples:
  postcopy demo
  postcopy demo -m 2G --smp 4 --workload zipf --working-set 256M
  postcopy demo --backing hugetlb --transport tcp --json
  postcopy demo -m 2G --multifd 4 --postcopy-after 1
  postcopy demo --backing memfd --collapse      small pages on the way, huge ones in the end
  postcopy demo --policy docs/examples/policy.py:Neighbours
  postcopy demo --accel kvm,dirty-ring-size=4096
  postcopy demo -m 1G --backing hugetlb --hugepage-size 1G
  postcopy demo --object memory-backend-memfd,id=more,size=64M,hugetlb=on
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "demo",
        help="a live postcopy migration between two processes, here and now",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    add_shape_options(parser, ram="512M")
    group = parser.add_argument_group("migration")
    group.add_argument(
        "--transport",
        choices=("unix", "tcp"),
        default="unix",
        help="how the two processes are connected (default unix)",
    )
    group.add_argument(
        "--postcopy-after",
        type=float,
        metavar="SECONDS",
        help="precopy for so long, then switch (default 0.5)",
    )
    group.add_argument(
        "--checksum",
        choices=("on", "off"),
        default="on",
        help="checksums on page batches and control frames (default on)",
    )
    group.add_argument(
        "--postcopy-if-not-converged-within",
        type=float,
        metavar="SECONDS",
        help="precopy for so long; then switch as soon as what is left does not fit the downtime "
        "limit (instead of --postcopy-after)",
    )
    group.add_argument(
        "--policy",
        metavar="MODULE:CLASS",
        help="your own policy at the source, or FILE.py:CLASS: when to switch over, what to push",
    )
    group.add_argument(
        "--multifd",
        type=int,
        metavar="CHANNELS",
        help="precopy over so many connections beside the main one (1 to 255; default none)",
    )
    group.add_argument(
        "--collapse",
        action="store_true",
        help="place small pages, and make 2 MiB pages of them once all are there",
    )
    parser.add_argument(
        "--json", action="store_true", help="the figures as one JSON object on stdout"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when the oracle found nothing and nothing failed."""
    if args.postcopy_after is None and args.postcopy_if_not_converged_within is None:
        args.postcopy_after = _POSTCOPY_AFTER_S
    for name in ("postcopy_after", "postcopy_if_not_converged_within"):
        seconds = getattr(args, name)
        if seconds is not None and not 0 <= seconds < _MIGRATION_S:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {seconds:g}: 0 to {_MIGRATION_S:g} seconds")
    _check_hugepages(args)
    return asyncio.run(_demo(args, Output(json_lines=args.json)))


def _check_hugepages(args: argparse.Namespace) -> None:
    """Two VMs need twice the pages: say so at once, with the one number to ask for."""
    from guestmem.backings import DEFAULT_HUGEPAGE_BYTES, Backing
    from guestmem.geometry import format_size, size_option
    from guestmem.pools import HugepagePool

    plan = memory_plan(args, "main")
    wanted: dict[int, int] = {}
    for idstr, length in (("main", args.ram_bytes), *plan.extra_blocks):
        backend = plan.backends[idstr]
        if backend.backing is Backing.HUGETLB:
            size = backend.hugepage_size or DEFAULT_HUGEPAGE_BYTES
            wanted[size] = wanted.get(size, 0) + 2 * -(-length // size)
    for size, pages in wanted.items():
        pool = HugepagePool(size)
        if not pool.exists:
            continue  # the VM itself says which sizes there are
        free = pool.state().obtainable
        if free < pages:
            raise UserError(
                f"two VMs of this size need {pages} huge pages of {format_size(size)}, "
                f"{free} are free",
                hint=f"postcopy hugepages reserve {pages - free} --size {size_option(size)} "
                "(as root), or less RAM: -m SIZE",
            )


async def _demo(args: argparse.Namespace, output: Output) -> int:
    """Whatever ends this, the children and the runtime directory are gone afterwards."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGINT is asyncio.run's own business
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    folder = Path(tempfile.mkdtemp(prefix="postcopy-demo-"))
    try:
        return await _migrate_and_report(args, output, folder)
    except asyncio.CancelledError:
        output.say("interrupted: both VMs were ended")
        raise KeyboardInterrupt from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _migrate_and_report(args: argparse.Namespace, output: Output, folder: Path) -> int:
    from .demo_report import DemoRun, show
    from .vm_child import VMChild

    shape = shape_arguments(args)
    record = DemoRun(args)
    policy = [] if args.policy is None else ["--policy", args.policy]
    source = VMChild("source", folder, [*shape, *policy])
    destination = VMChild("destination", folder, [*shape, "--incoming", "defer"])
    try:
        output.say(f"starting two VMs: {record.shape_text()}")
        async with asyncio.TaskGroup() as starting:
            starting.create_task(source.start(timeout_s=_READY_S))
            starting.create_task(destination.start(timeout_s=_READY_S))
        plan = await _prepare(args, source.link, destination.link, folder)
        await _migrate(plan, output, record, source.link, destination.link)
        await _judge(record, source.link, destination.link)
    except* UserError as failures:
        record.errors += [str(error) for error in _leaves(failures)]
    finally:
        await asyncio.gather(source.end(), destination.end())
    for child in (source, destination):
        record.note_exit(child.name, child.exit_status, child.last_words())
    show(record, output)
    output.emit(record.result())
    return 0 if record.is_ok else 1


def _leaves(group: BaseExceptionGroup[UserError]) -> list[UserError]:
    found: list[UserError] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _prepare(
    args: argparse.Namespace, source: VMLink, destination: VMLink, folder: Path
) -> Plan:
    """Settings on both sides, and the destination listening."""
    from .drive import Plan, configure

    wanted = "tcp:127.0.0.1:0" if args.transport == "tcp" else f"unix:{folder}/migration"
    settings: dict[str, object] = {
        "x-checksum": args.checksum == "on",
        "x-collapse": args.collapse,
    }
    if args.multifd is not None:
        settings["multifd-channels"] = args.multifd
    plan = Plan(
        uri=wanted,
        postcopy_after_s=args.postcopy_after,
        converge_within_s=args.postcopy_if_not_converged_within,
        timeout_s=_MIGRATION_S,
        capabilities=() if args.multifd is None else ("multifd",),
        parameters=settings,
    )
    await configure(source, plan, is_source=True)
    await configure(destination, plan, is_source=False)
    await destination.execute("migrate-set-parameters", settings)
    # it stays to be asked why, should it fail
    await destination.execute("migrate-incoming", {"uri": wanted, "exit-on-error": False})
    if args.transport == "tcp":
        (address,) = (await destination.execute("query-migrate"))["socket-address"]
        plan = dataclasses.replace(plan, uri=f"tcp:{address['host']}:{address['port']}")
    return plan


async def _migrate(
    plan: Plan, output: Output, record: DemoRun, source: VMLink, destination: VMLink
) -> None:
    """From the start to the end on both sides."""
    from .drive import ENDED, drive
    from .progress import Watcher

    with Watcher(output, is_live=output.is_terminal, emits=False) as watcher:

        def observe(progress: Progress) -> None:
            record.note(progress)
            watcher.show(progress)

        try:
            record.source = dict((await drive(source, plan, observe)).info)
        except UserError:
            record.destination = await _end_of(destination, ENDED)
            raise
        # Not when interrupted: nobody wants to wait for an end then.
        record.destination = await _end_of(destination, ENDED)


async def _end_of(vm: VMLink, ended: frozenset[str]) -> dict[str, object]:
    """The destination's last word, which may come a little after the source's."""
    deadline = asyncio.get_running_loop().time() + _LAG_S
    while True:
        info: dict[str, object] = dict(await vm.execute("query-migrate"))
        left_s = deadline - asyncio.get_running_loop().time()
        if info.get("status") in ended or left_s <= 0:
            return info
        await vm.wait_change(left_s)


async def _collapsed(vm: VMLink) -> dict[str, object]:
    """Its figures once no page is being made huge any more; the guest runs meanwhile."""
    while True:
        info: dict[str, object] = dict(await vm.execute("query-migrate"))
        ours = info.get("x-postcopy")
        collapse = ours.get("collapse", {}) if isinstance(ours, dict) else {}
        if collapse.get("state") != "running":
            return info
        await asyncio.sleep(_LOOK_S)


async def _judge(record: DemoRun, source: VMLink, destination: VMLink) -> None:
    """Stop the guest where it lives now and check all of its memory."""
    states = {}
    for vm in (source, destination):
        states[vm.name] = (await vm.execute("query-status"))["status"]
    if states["source"] == states["destination"] == "running":
        record.errors.append("the guest runs on both sides")
    survivor = source if states["source"] == "running" else destination
    if states[survivor.name] != "running":
        record.errors.append(f"the guest runs nowhere: {states}")
        return
    if survivor is destination:
        record.destination = await _collapsed(destination)
    await survivor.execute("stop")
    record.machine = await survivor.execute("x-query-machine")
    record.survivor = survivor.name
    record.oracle = await survivor.execute("x-oracle-sweep")
