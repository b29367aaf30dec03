"""``postcopy bench``: the machine's own limits, and how close the runtime comes to them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .output import Output, UserError

if TYPE_CHECKING:
    from migration.bench.session import Advance, Outcome
    from migration.bench.tables import Table

_LOG_COLUMNS = 140
_DESCRIPTION = """\
Measures, in one run and on this machine:

  limits   what the machine itself can do, in C: wake-ups, faults, sockets, UFFDIO_COPY, and the
           floor of one remote fault as one path
  runtime  two `postcopy run` processes: fault latency felt by the guest, push throughput,
           downtime, memory
  qemu     QEMU to QEMU, if qemu-system-x86_64 is installed

and shows each as it is and as a ratio to its limit. Placement decides the latencies: "same" keeps
everything on one processor, "split" gives source and destination one each, "cross" wakes another
processor at every step, "chosen" is what the runtime picks by itself. Other work on the machine
shows as spread between runs; trust the ratios of one run, not figures of two."""

_EXAMPLES = """\
examples:
  postcopy bench                            everything, about a minute
  postcopy bench --quick                    a first impression in under 15 seconds
  postcopy bench --only limits --cpus 3,5   the machine alone, on two processors of your choice
  postcopy bench --only runtime -m 1G       the runtime with 1 GiB of guest RAM
  postcopy bench --scale                    sparse guests of 1 GiB to 1 TiB, half a minute
  postcopy bench --hugepages                what huge pages cost in a postcopy and bring after it
  postcopy bench --json | jq 'select(.record == "comparison")'
  postcopy bench --full --export-markdown bench.md

exit status: 0 measured, 1 a part could not be measured, 2 wrong use
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the runtime against the machine's own limits",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one object per line on stdout")
    add(
        "--only",
        choices=("limits", "runtime", "qemu"),
        action="append",
        help="measure this part alone; may be given more than once",
    )
    add(
        "--transport",
        choices=("unix", "tcp", "both"),
        help="default: both, with --quick unix",
    )
    add(
        "--cpus",
        type=_cpu_list,
        metavar="LIST",
        help='processors for pinned rows, e.g. "3,5": the first is "same", the second "cross"',
    )
    add(
        "-m",
        "--memory",
        type=_size,
        metavar="SIZE",
        help="guest RAM of the runtime and qemu parts; a plain number is MiB "
        "(default: 64M with --quick, 256M, 1G with --full)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--scale",
        action="store_true",
        help="instead: how set-up, fault and round cost grow with RAM, up to -m (default 1T)",
    )
    instead.add_argument(
        "--hugepages",
        action="store_true",
        help="instead: the same guest on small, collapsed and huge pages: its faults in postcopy, "
        "what a touch takes after it (-m: default 512M)",
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="fewer samples, under 15 seconds")
    effort.add_argument("--full", action="store_true", help="more samples and rows, minutes")
    add("--export-markdown", type=Path, metavar="FILE", help="write the tables there as well")
    add("--force", action="store_true", help="overwrite FILE if it exists")
    parser.set_defaults(func=run)


def _cpu_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of processors such as 0,1") from None


def _size(text: str) -> int:
    from migration.monitor.units import parse_size

    try:
        size = parse_size(text, default_unit="M")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < 16 << 20 or size % (1 << 20):
        raise argparse.ArgumentTypeError(f"{text!r}: whole MiB, at least 16M")
    return size


def run(args: argparse.Namespace) -> int:
    """Measure and show. 0 when every wanted part was measured, else 1.

    :raises UserError: options that cannot be followed; nothing was measured.
    """
    from migration.bench.machine import choose_processors
    from migration.bench.session import PARTS, TRANSPORTS, Plan, measure

    output = Output(json_lines=args.json)
    export: Path | None = args.export_markdown
    if export is not None and export.exists() and not args.force:
        raise UserError(f"{export} exists", hint="--force overwrites it", status=2)
    if args.scale:
        return _scale(output, export, args.memory)
    if args.hugepages:
        return _hugepages(output, export, args.memory)
    try:
        processors = choose_processors(args.cpus)
    except ValueError as error:
        raise UserError(f"--cpus: {error}", hint="taskset -p $$ shows yours", status=2) from None
    transport = args.transport or ("unix" if args.quick else "both")
    plan = Plan(
        processors=processors,
        effort="quick" if args.quick else "full" if args.full else "normal",
        parts=args.only or PARTS,
        transports=TRANSPORTS if transport == "both" else (transport,),
        ram_bytes=args.memory,
    )

    def emit(records: Iterable[Mapping[str, object]]) -> None:
        for record in records:
            output.emit(record)

    with _progress(output) as advance:
        outcome = measure(plan, emit, advance)
    if not args.json:
        _show(output, outcome)
    if export is not None:
        export.write_text(outcome.to_markdown())
    for part, reason in outcome.failures.items():
        output.say(f"postcopy bench: {part}: {reason}")
    return 1 if outcome.failures else 0


def _scale(output: Output, export: Path | None, largest: int | None) -> int:
    """``--scale``; 0 when every guest's memory was intact."""
    from migration.bench.scale import SIZES, measure_scale, scale_table

    sizes = [size for size in SIZES if largest is None or size <= largest]
    if not sizes:
        raise UserError(f"-m: --scale begins with {SIZES[0] >> 30}G", status=2)
    rows = measure_scale(sizes, done=lambda row: output.emit(row.as_json()))
    table = scale_table(rows)
    _show_table(output, table)
    if export is not None:
        export.write_text(table.to_markdown())
    return 1 if any(row.errors for row in rows) else 0


def _hugepages(output: Output, export: Path | None, ram_bytes: int | None) -> int:
    """``--hugepages``; 0 when every guest's memory was intact. Without a pool for them, pages from
    one are left out and the remedy is told.
    """
    from guestmem.geometry import THP_BYTES
    from migration.bench import hugepages

    size = ram_bytes or hugepages.RAM_BYTES
    if size % THP_BYTES:
        raise UserError("-m: --hugepages needs whole pages of 2 MiB", status=2)
    short = hugepages.pool_shortage(size)
    kinds = [kind for kind in hugepages.KINDS if kind != hugepages.POOL or short is None]
    rows = hugepages.measure_hugepages(
        kinds, ram_bytes=size, done=lambda row: output.emit(row.as_json())
    )
    table = hugepages.hugepages_table(rows)
    _show_table(output, table)
    if short is not None:
        output.say(f"{hugepages.POOL}: left out: {short}")
    if export is not None:
        export.write_text(table.to_markdown())
    return 1 if any(row.errors for row in rows) else 0


@contextmanager
def _progress(output: Output) -> Iterator[Advance]:
    """What is being measured, as one changing line on a terminal and nothing elsewhere."""
    if not output.is_terminal:
        yield lambda text, total: None
        return
    with output.console.status("") as status:
        done: dict[int, int] = {}

        def advance(text: str, total: int) -> None:
            done[total] = done.get(total, 0) + 1
            status.update(f"{text} ({done[total]}/{total})")

        yield advance


def _show(output: Output, outcome: Outcome) -> None:
    from migration.bench.tables import describe_machine

    output.say(describe_machine(outcome.machine))
    for table in outcome.tables():
        output.say("")
        _show_table(output, table)


def _show_table(output: Output, table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, title_justify="left", title_style="bold")
    for index, column in enumerate(table.columns):
        is_text = index < table.text_columns
        shown.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in table.rows:
        shown.add_row(*row)
    # Without a terminal there is no width to fit into; a log should not fold its tables at 80.
    width = None if output.is_terminal else _LOG_COLUMNS
    Console(file=output.text_stream, width=width, highlight=False).print(shown, markup=False)
