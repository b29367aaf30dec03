"""``postcopy hugepages``: look at the huge page pools, take pages, give them back; file systems.

On a bare host also ``python -m guestmem.hugepages``.
"""

import argparse
import dataclasses
import errno
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from guestmem.cgroups import hugetlb_limit
from guestmem.errors import GuestMemoryError
from guestmem.geometry import format_size, parse_size, size_option
from guestmem.hugejournal import HugepageJournal, Taking, noted
from guestmem.hugemount import HugeMount, find_mount, make_mount, mounts, unmount
from guestmem.pools import HugepagePool, nodes, page_sizes

_EXAMPLES = """\
examples:
  {prog} show                      every pool, what is taken, file systems
  {prog} reserve 64                64 pages of 2 MiB more
  {prog} reserve 1 --size 1G --node 0
  {prog} reserve 64 --surplus      let the kernel make 64 more when needed
  {prog} give-back                 everything taken, also by a crashed run
  {prog} give-back 3               one taking, by the number reserve printed
  {prog} mount --size 1G           a file system for --mem-path; prints where
  {prog} unmount                   those that 'mount' made

Only what was taken is given back: pages that were in the pool before stay there, and only file
systems made here are unmounted. Changing anything needs root. --json prints one object per line on
standard output.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 refused (2: usage, by argparse)."""
    parser = argparse.ArgumentParser(prog="python -m guestmem.hugepages")
    add_commands(parser, "python -m guestmem.hugepages")
    return run(parser.parse_args(arguments))


def add_commands(parser: argparse.ArgumentParser, prog: str) -> None:
    """Declare what can be asked. :param prog: how the user called it, for the examples."""
    parser.description = "Look at the kernel's huge page pools, take pages, give them back."
    parser.epilog = _EXAMPLES.format(prog=prog)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--journal", type=Path, metavar="DIR", help="default: /run, else $XDG_RUNTIME_DIR"
    )
    common.add_argument("--json", action="store_true", help="objects on standard output")
    sized = argparse.ArgumentParser(add_help=False)
    sized.add_argument(
        "--size", type=_page_size, default=_page_size("2M"), help="of a page: 2M (default), 1G"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("show", parents=[common], help="pools, takings, file systems")
    reserve = commands.add_parser("reserve", parents=[common, sized], help="grow a pool")
    reserve.add_argument("pages", type=int, help="how many pages more")
    where = reserve.add_mutually_exclusive_group()
    where.add_argument("--node", type=int, help="NUMA node; the kernel chooses unless told")
    where.add_argument(
        "--surplus", action="store_true", help="not now: when needed, from memory free then"
    )
    reserve.add_argument(
        "--owner",
        type=int,
        metavar="PID",
        help="that process gives them back: until it ends, 'give-back' leaves them alone",
    )
    give_back = commands.add_parser("give-back", parents=[common], help="shrink the pools again")
    give_back.add_argument("id", type=int, nargs="?", help="one taking; all unless told")
    mount = commands.add_parser(
        "mount", parents=[common, sized], help="a file system of huge pages: found, or made"
    )
    mount.add_argument("directory", type=Path, nargs="?", help="made there; else found or made")
    unmount = commands.add_parser("unmount", parents=[common], help="what 'mount' made")
    unmount.add_argument("directory", type=Path, nargs="?", help="this one; all unless told")


def run(options: argparse.Namespace) -> int:
    """Run what :func:`add_commands` parsed; as :func:`main`."""
    try:
        _COMMANDS[options.command](options)
    except KeyError as error:
        print(f"no taking number {error}", file=sys.stderr)
        return 1
    except (GuestMemoryError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _page_size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _show(options: argparse.Namespace) -> None:
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
            f" {state.reserved} of them reserved, {state.surplus} surplus"
            + (f" of at most {state.overcommit}" if state.overcommit else ""),
        )
    for size in page_sizes():
        limit = hugetlb_limit(size)
        if limit is not None:
            text = f"{limit.used // size} of {limit.maximum // size} pages used"
            _tell(
                options.json,
                {"cgroup": str(limit.group), "size": size_option(size)}
                | {"maximum": limit.maximum, "used": limit.used},
                f"{format_size(size):>8}  cgroup {limit.group}: {text}",
            )
    for mount in mounts():
        _tell_mount(options.json, mount, "mounted by us" if mount.is_ours else "mounted")
    for entry in noted(options.journal):
        _tell_taking(options.json, entry, "taken")


def _reserve(options: argparse.Namespace) -> None:
    if options.pages < 1:
        raise GuestMemoryError(errno.EINVAL, f"cannot take {options.pages} huge pages")
    journal = HugepageJournal(options.journal)
    entry = journal.take(
        options.pages,
        options.size,
        node=options.node,
        surplus=options.surplus,
        owner_pid=options.owner,
    )
    _tell_taking(options.json, entry, "taken")


def _give_back(options: argparse.Namespace) -> None:
    journal = HugepageJournal(options.journal)
    for entry in journal.give_back(options.id):
        _tell_taking(options.json, entry, "given back")
    for entry in journal.entries():
        if options.id is None and entry.owner is not None:
            _tell_taking(options.json, entry, f"left to process {entry.owner[0]}")


def _mount(options: argparse.Namespace) -> None:
    found = None if options.directory else find_mount(options.size)
    made = found or make_mount(options.size, options.directory)
    _tell_mount(options.json, made, "found" if found else "made")
    if not options.json:
        print(made.directory)


def _unmount(options: argparse.Namespace) -> None:
    for mount in unmount(options.directory):
        _tell_mount(options.json, mount, "unmounted")


def _tell_mount(as_json: bool, mount: HugeMount, what: str) -> None:
    record: dict[str, object] = {
        "mount": str(mount.directory),
        "size": size_option(mount.page_size),
        "state": what,
    }
    _tell(as_json, record, f"{format_size(mount.page_size):>8}  {mount.directory}: {what}")


def _tell_taking(as_json: bool, entry: Taking, what: str) -> None:
    record: dict[str, object] = {
        "id": entry.id,
        "size": size_option(entry.page_size),
        "node": entry.node,
        "pages": entry.taken,
        "state": what,
    } | ({"surplus": True} if entry.is_surplus else {})
    where = "" if entry.node is None else f" on node {entry.node}"
    size = format_size(entry.page_size)
    kind = ("surplus " if entry.is_surplus else "") + ("page" if entry.taken == 1 else "pages")
    kind += " allowed" if entry.is_surplus else ""
    _tell(as_json, record, f"number {entry.id}: {entry.taken} {kind} of {size}{where}, {what}")


def _tell(as_json: bool, record: dict[str, object], text: str) -> None:
    if as_json:
        print(json.dumps(record))
    else:
        print(text, file=sys.stderr)


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "show": _show,
    "reserve": _reserve,
    "give-back": _give_back,
    "mount": _mount,
    "unmount": _unmount,
}


if __name__ == "__main__":
    sys.exit(main())
