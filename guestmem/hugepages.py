"""``python -m guestmem.hugepages``: look at the huge page pools, take pages, give them back."""

import argparse
import dataclasses
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from guestmem.errors import GuestMemoryError
from guestmem.geometry import format_size, parse_size, size_option
from guestmem.hugejournal import HugepageJournal, Taking
from guestmem.pools import HugepagePool, nodes, page_sizes

_EXAMPLES = """\
examples:
  python -m guestmem.hugepages show                      every pool, and what is taken
  python -m guestmem.hugepages reserve 64                64 pages of 2 MiB more
  python -m guestmem.hugepages reserve 1 --size 1G --node 0
  python -m guestmem.hugepages give-back                 everything taken, also by a crashed run
  python -m guestmem.hugepages give-back 3               one taking, by the number reserve printed

Only what was taken is given back: pages that were in the pool before stay there.
Growing and shrinking need root. --json prints one object per line on standard output.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 refused (2: usage, by argparse)."""
    options = _parser().parse_args(arguments)
    try:
        journal = HugepageJournal(options.journal)
        if options.command == "reserve":
            _reserve(journal, options)
        elif options.command == "give-back":
            _give_back(journal, options)
        else:
            _show(journal, options)
    except KeyError as error:
        print(f"no taking number {error}", file=sys.stderr)
        return 1
    except (GuestMemoryError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m guestmem.hugepages",
        description="Look at the kernel's huge page pools, take pages, give them back.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--journal", type=Path, metavar="DIR", help="default: /run, else $XDG_RUNTIME_DIR"
    )
    common.add_argument("--json", action="store_true", help="objects on standard output")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", parents=[common], help="pools and takings")
    reserve = commands.add_parser("reserve", parents=[common], help="grow a pool")
    reserve.add_argument("pages", type=int, help="how many pages more")
    reserve.add_argument(
        "--size", type=parse_size, default=parse_size("2M"), help="of a page: 2M (default), 1G"
    )
    reserve.add_argument("--node", type=int, help="NUMA node; the kernel chooses unless told")
    give_back = commands.add_parser("give-back", parents=[common], help="shrink the pools again")
    give_back.add_argument("id", type=int, nargs="?", help="one taking; all unless told")
    return parser


def _show(journal: HugepageJournal, options: argparse.Namespace) -> None:
    pools = [HugepagePool(size, node) for size in page_sizes() for node in (None, *nodes())]
    for pool in pools:
        if not pool.exists:
            continue
        state = pool.state()
        record: dict[str, object] = {"pool": size_option(pool.page_size), "node": pool.node}
        record |= dataclasses.asdict(state) | {"available": state.available}
        where = "all nodes" if pool.node is None else f"node {pool.node}"
        _tell(
            options.json,
            record,
            f"{format_size(pool.page_size):>8}  {where:<9}  {state.total} pages, {state.free} free,"
            f" {state.reserved} of them reserved, {state.surplus} surplus",
        )
    for entry in journal.entries():
        _tell_taking(options.json, entry, "taken")


def _reserve(journal: HugepageJournal, options: argparse.Namespace) -> None:
    if options.pages < 1:
        raise GuestMemoryError(errno.EINVAL, f"cannot take {options.pages} huge pages")
    entry = journal.take(options.pages, options.size, node=options.node)
    _tell_taking(options.json, entry, "taken")


def _give_back(journal: HugepageJournal, options: argparse.Namespace) -> None:
    for entry in journal.give_back(options.id):
        _tell_taking(options.json, entry, "given back")
    for entry in journal.entries():
        if options.id is None and entry.owner is not None:
            _tell_taking(options.json, entry, f"left to process {entry.owner[0]}")


def _tell_taking(as_json: bool, entry: Taking, what: str) -> None:
    record: dict[str, object] = {
        "id": entry.id,
        "size": size_option(entry.page_size),
        "node": entry.node,
        "pages": entry.taken,
        "state": what,
    }
    where = "" if entry.node is None else f" on node {entry.node}"
    size = format_size(entry.page_size)
    _tell(as_json, record, f"number {entry.id}: {entry.taken} pages of {size}{where} {what}")


def _tell(as_json: bool, record: dict[str, object], text: str) -> None:
    if as_json:
        print(json.dumps(record))
    else:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
