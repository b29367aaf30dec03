"""``postcopy analyze``: a migration stream or snapshot taken apart."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .output import Output, UserError

if TYPE_CHECKING:
    from migration.analyze.events import Event
    from migration.analyze.image import BlockImage
    from migration.analyze.pagemap import BlockState
    from migration.analyze.session import Session
    from migration.analyze.source import Source

ImageFor: TypeAlias = "Callable[[BlockState], BlockImage | None]"

STATUS_BROKEN = 1
STATUS_USAGE = 2
STATUS_DIFFERENT = 3

_DESCRIPTION = """\
Takes a QEMU migration stream or snapshot apart: header, configuration, every section with offset
and length, devices field by field, commands, RAM blocks. Ours are the same format.

FILE is the main channel; give the other channels of the same migration (preempt, multifd, those
opened by a postcopy recovery, in order) along with it, in any mixture; each is recognised by its
first bytes. "-" reads standard input; .xz, .gz and .bz2 files are unpacked. A stream inside a
larger file is found within its first 16 MiB.

One pass, whatever the size of the stream. Device data is held back until the description at the end
of the stream names its fields (at most --hold bytes); a postcopy package has no description, so its
devices are shown as bytes, with the subsections that can be recognised."""

_EPILOG = """\
examples:
  postcopy analyze vm.bin                          everything, as text
  postcopy analyze vm.bin --device pckbd           one device, all its fields in full
  postcopy analyze vm.bin --device '*/PIIX3'       by pattern
  postcopy analyze vm.bin --ram-map                what of RAM is there, zero, sent twice
  postcopy analyze vm.bin --dump-ram pc.ram ram.bin
  postcopy analyze main.bin preempt.bin --return-path back.bin
  postcopy analyze vm1 --device timer              a parked VM (as a mapped-ram snapshot)
  postcopy analyze before.bin --diff after.bin     what differs in configuration, devices, RAM
  postcopy analyze vm.bin --json | jq -c 'select(.kind == "section") | [.name, .length]'

lines of --json: header, configuration, section, command, description, return-path, multifd,
preempt, ram-block, and last end or error; with several files also channel (which file comes next)
and cut (a channel that recovery replaced). Offsets are bytes in the file; a section's length
reaches from its type byte to the end of its footer, without the heads of checksum frames.
pages.resent counts pages that had been sent before.

exit status: 0 whole stream read, 1 it breaks (the last line says where, and what was good last),
2 usage, 3 --diff found differences"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "analyze",
        help="take a migration stream or snapshot apart",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="channels of one migration")
    parser.add_argument(
        "--return-path",
        action="append",
        default=[],
        metavar="FILE",
        help="the destination's messages (may be given again: one per recovery)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line on stdout")
    parser.add_argument(
        "--device", metavar="NAME", help="only sections of this name or pattern, fields in full"
    )
    parser.add_argument("--ram-map", action="store_true", help="show which pages were sent how")
    parser.add_argument(
        "--dump-ram",
        nargs=2,
        action="append",
        default=[],
        metavar=("BLOCK", "OUT"),
        help="write a RAM block's content to a (sparse) file",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT of --dump-ram")
    parser.add_argument(
        "--diff",
        action="append",
        default=[],
        metavar="OTHER",
        help="compare with another migration (may be given again for its other channels)",
    )
    parser.add_argument(
        "--hold",
        default="256M",
        metavar="SIZE",
        help="device data held back for the description at most (default %(default)s)",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Analyse, print, and return the exit status."""
    output = Output(json_lines=args.json)
    with ExitStack() as stack:
        if args.diff:
            return _diff(args, output, stack)
        return _analyze(args, output, stack)


def _analyze(args: argparse.Namespace, output: Output, stack: ExitStack) -> int:
    from migration.analyze.events import ErrorEvent, RamBlockEvent
    from migration.analyze.report_text import TextReport

    dumps = _Dumps(dict(args.dump_ram), stack, force=args.force)
    session = _session(args, args.files, args.return_path, dumps.image_for, stack)
    report = None
    if not output.json_lines:
        is_long = args.device is not None
        report = TextReport(output.console, is_long=is_long, with_map=args.ram_map)
    filtered = _Filter(args.device)
    status = 0
    for event in session.events():
        if isinstance(event, ErrorEvent):
            status = STATUS_BROKEN
        if isinstance(event, RamBlockEvent):
            dumps.finish(event.block)
        if not filtered.wants(event):
            continue
        if report is None:
            output.emit(event.to_json())
        else:
            report.show(event)
    dumps.complain_unless_found(session)
    filtered.complain_unless_found()
    return status


def _diff(args: argparse.Namespace, output: Output, stack: ExitStack) -> int:
    from migration.analyze.diff import Snapshot, differences

    sides = []
    for files, returns in ((args.files, args.return_path), (args.diff, [])):
        side = Snapshot(stack)
        for event in _session(args, files, returns, side.image_for, stack).events():
            side.feed(event)
        sides.append(side)
        if side.error is not None:
            output.emit(side.error.to_json() | {"file": files[0]})
            where = f"{side.error.offset:#x}"
            raise UserError(f"{files[0]} breaks at {where}: {side.error.message}")
    count = 0
    for line in differences(*sides):
        count += 1
        output.emit(line)
        if not output.json_lines:
            output.say(_difference_text(line))
    output.emit({"kind": "differences", "count": count})
    if not output.json_lines and not count:
        output.say("no difference")
    return STATUS_DIFFERENT if count else 0


def _difference_text(line: dict[str, object]) -> str:
    head = f"{line['what']} {line['name']}"
    ranges = line.get("ranges")
    if isinstance(ranges, list):
        shown = " ".join(f"{start:#x}+{length:#x}" for start, length in ranges[:8])
        more = " …" if len(ranges) > 8 else ""
        return f"{head}: {line['pages']} pages differ: {shown}{more}"
    return f"{head}: {_side(line['a'])} → {_side(line['b'])}"


def _side(value: object) -> str:
    return "absent" if value is None else str(value)


def _session(
    args: argparse.Namespace,
    files: list[str],
    return_paths: list[str],
    image_for: ImageFor,
    stack: ExitStack,
) -> Session:
    from migration.analyze.session import RoleError, Session
    from migration.monitor.units import parse_size

    try:
        held_bytes_max = parse_size(args.hold)
        return Session(
            [stack.enter_context(_open(path)) for path in files],
            [stack.enter_context(_open(path)) for path in return_paths],
            image_for=image_for,
            with_map=args.ram_map,
            held_bytes_max=held_bytes_max,
        )
    except (RoleError, ValueError, OSError) as error:
        raise UserError(str(error), status=STATUS_USAGE) from None


def _open(path: str) -> Source:
    """A file, or a parked VM, which is read as the snapshot it could be."""
    import io
    from typing import BinaryIO, cast

    from migration.analyze.source import Source, open_source
    from migration.park.as_stream import ParkedStream, is_parked
    from migration.park.manifest import ParkError

    if not is_parked(path):
        return open_source(path)
    try:
        stack = ExitStack()
        raw = stack.enter_context(io.BufferedReader(ParkedStream(Path(path)), 1 << 20))
        return Source(cast(BinaryIO, raw), path, owned=stack)
    except ParkError as error:
        raise UserError(str(error)) from None


class _Filter:
    """``--device``: only device sections of that name, and how the stream ended."""

    def __init__(self, pattern: str | None) -> None:
        self._pattern = pattern
        self._names: dict[str, None] = {}
        self._found = False

    def wants(self, event: Event) -> bool:
        from migration.analyze.events import ErrorEvent, SectionEvent

        if self._pattern is None or isinstance(event, ErrorEvent):
            return True
        if not isinstance(event, SectionEvent):
            return False
        name = event.header.idstr
        self._names[name] = None
        candidates = (name, name.rpartition("/")[2], f"{name}#{event.header.instance_id}")
        is_wanted = any(fnmatchcase(each, self._pattern) for each in candidates)
        self._found = self._found or is_wanted
        return is_wanted

    def complain_unless_found(self) -> None:
        if self._pattern is not None and not self._found:
            raise UserError(
                f"no section {self._pattern!r}",
                hint=f"one of: {', '.join(self._names)}" if self._names else None,
                status=STATUS_USAGE,
            )


class _Dumps:
    """``--dump-ram``: files for the blocks that were named, created when the block shows up."""

    def __init__(self, wanted: dict[str, str], stack: ExitStack, *, force: bool) -> None:
        self._wanted = wanted
        self._stack = stack
        self._force = force
        self._images: dict[str, BlockImage] = {}
        for path in wanted.values():
            if not force and Path(path).exists():
                raise UserError(
                    f"{path} exists", hint="another name, or --force", status=STATUS_USAGE
                )

    def image_for(self, block: BlockState) -> BlockImage | None:
        from migration.analyze.image import BlockImage

        path = self._wanted.get(block.idstr)
        if path is None:
            return None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if self._force else os.O_EXCL)
        image = self._stack.enter_context(BlockImage(os.open(path, flags, 0o600)))
        self._images[block.idstr] = image
        return image

    def finish(self, block: BlockState) -> None:
        """Give the file the block's exact length: never-sent pages at the end are a hole."""
        if block.idstr in self._images:
            self._images[block.idstr].set_length(block.used_length)

    def complain_unless_found(self, session: Session) -> None:
        missing = [name for name in self._wanted if name not in self._images]
        if missing:
            names = [block.idstr for block in session.state.ram.map]
            raise UserError(
                f"the stream has no RAM block {missing[0]!r}",
                hint=f"one of: {', '.join(names)}" if names else None,
                status=STATUS_USAGE,
            )
