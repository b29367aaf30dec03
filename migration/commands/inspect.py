"""``postcopy inspect``: what a live process's memory is made of, and giving it huge pages."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from .output import Output, UserError, table_text

if TYPE_CHECKING:
    from migration.tracee.look import ProcessView
    from migration.tracee.mappings import ProcessMapping

_EPILOG = """\
Looking reads /proc and disturbs nobody. --collapse has the kernel gather small pages into
transparent huge ones while the process runs. --hugepages makes the process itself map pages from
the pool in the place of memory it has: all its threads stand still for the length of a copy. Should
this command be killed meanwhile, a helper of its own finishes or undoes what was begun.

RANGE is START-END or START+LENGTH, addresses in hex as shown; 'all' is every mapping it fits.
After --hugepages the process must not unmap parts of a huge page, and a fork needs free pages in
the pool; --collapse has no such conditions.

examples:
  postcopy inspect 4242
  postcopy inspect 4242 --json | jq 'select(.kind == "mapping" and .uffd != [])'
  postcopy inspect 4242 --collapse all
  postcopy hugepages reserve 64 && postcopy inspect 4242 --hugepages 0x7f1200000000+128M

exit status: 0 done, 1 it could not be done (the process is as it was, but for what is named as
done before)"""
_SHOWN_BYTES = 1 << 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "inspect",
        help="a live process's mappings, huge pages and userfaultfds; give it huge pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("pid", type=int, metavar="PID")
    parser.add_argument(
        "--all", action="store_true", help="also mappings under 1 MiB with nothing special"
    )
    change = parser.add_mutually_exclusive_group()
    change.add_argument(
        "--collapse", metavar="RANGE", help="gather small pages into transparent huge ones"
    )
    change.add_argument(
        "--hugepages", metavar="RANGE", help="put pages from the pool in the place of this memory"
    )
    parser.add_argument(
        "--page-size", default="2M", metavar="SIZE", help="of --hugepages (default 2M)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Look, or change; 0 when it was done."""
    from migration.tracee.errors import TraceeError

    out = Output(json_lines=args.json)
    try:
        if args.collapse:
            return _collapse(args, out)
        if args.hugepages:
            return _replace(args, out)
        _show(args, out)
        return 0
    except TraceeError as error:
        raise UserError(str(error), hint=error.hint) from None


# -- looking --------------------------------------------------------------------------------------


def _show(args: argparse.Namespace, out: Output) -> None:
    from migration.tracee.look import look

    view = look(args.pid)
    for record in _records(view):
        out.emit(record)
    threads = "1 thread" if view.thread_count == 1 else f"{view.thread_count} threads"
    out.say(f"{view.name} ({view.pid}), {threads}")
    shown = [m for m in view.mappings if args.all or _is_of_interest(m)]
    rows: list[tuple[str, ...]] = [
        ("address", "", "size", "in memory", "pages", "huge", "userfaultfd", "what")
    ]
    rows += [_row(mapping) for mapping in shown]
    out.say(table_text(rows))
    if left := len(view.mappings) - len(shown):
        out.say(f"  and {left} smaller mappings (--all)")
    _show_contexts(view, out)


def _is_of_interest(mapping: ProcessMapping) -> bool:
    special = mapping.huge or mapping.uffd_modes or mapping.is_hugetlb
    return bool(special) or mapping.rss >= _SHOWN_BYTES


def _row(m: ProcessMapping) -> tuple[str, ...]:
    huge = f"{100 * m.huge // m.rss}%" if m.huge and m.rss else ""
    return (
        f"{m.start:x}-{m.end:x}",
        m.permissions,
        _size(m.length),
        _size(m.rss),
        _size(m.page_size),
        huge,
        ", ".join(m.uffd_modes),
        m.name,
    )


def _show_contexts(view: ProcessView, out: Output) -> None:
    for context in view.contexts:
        what = "no handshake yet" if context.features is None else _names(int(context.features))
        out.say(
            f"userfaultfd {context.fd}: {what}; {context.total} messages not answered, "
            f"{context.pending} of them not read"
        )
    if view.registered and not view.contexts:
        out.say("its userfaultfd is in another process's hands")
    for tid, name in view.waiting:
        out.say(f"thread {tid} ({name}) sleeps on a page")


def _names(features: int) -> str:
    from uffd import Feature

    names = [bit.name or hex(bit) for bit in Feature if features & bit]
    return ", ".join(names) or "no features"


def _records(view: ProcessView) -> list[dict[str, object]]:
    head: dict[str, object] = {
        "kind": "process",
        "pid": view.pid,
        "name": view.name,
        "threads": view.thread_count,
    }
    records = [head, *(_mapping_record(mapping) for mapping in view.mappings)]
    for context in view.contexts:
        features = None if context.features is None else int(context.features)
        counts = {"pending": context.pending, "total": context.total}
        records.append({"kind": "userfaultfd", "fd": context.fd, "features": features, **counts})
    records += [{"kind": "waiting", "tid": tid, "name": name} for tid, name in view.waiting]
    return records


def _mapping_record(m: ProcessMapping) -> dict[str, object]:
    return {
        "kind": "mapping",
        "start": m.start,
        "end": m.end,
        "permissions": m.permissions,
        "name": m.name,
        "page_size": m.page_size,
        "rss": m.rss,
        "swap": m.swap,
        "huge": m.huge,
        "uffd": list(m.uffd_modes),
        "flags": sorted(m.flags),
    }


def _size(length: int) -> str:
    for bytes_, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if length >= bytes_:
            return f"{length / bytes_:.4g} {unit}"
    return str(length) if length else "0"


# -- changing -------------------------------------------------------------------------------------


def _collapse(args: argparse.Namespace, out: Output) -> int:
    from migration.tracee.collapse import collapse

    result = collapse(args.pid, _ranges(args.collapse))
    if not result.tried:
        raise UserError(
            f"process {args.pid} has no private memory there in which huge pages could form",
            hint=f"postcopy inspect {args.pid}; a huge page needs 2 MiB of one mapping, aligned",
        )
    out.emit(
        {
            "kind": "collapsed",
            "tried": result.tried,
            "before": result.before,
            "after": result.after,
            "refused": [{"start": start, "reason": reason} for start, reason in result.refused],
        }
    )
    out.say(f"in huge pages: {_size(result.before)} before, {_size(result.after)} now")
    if result.refused:
        reasons = "; ".join(sorted({reason for _, reason in result.refused}))
        count = len(result.refused)
        out.say(f"{count} huge page{'s'[: count > 1]} could not be made: {reasons}")
    return 0 if result.after else 1


def _replace(args: argparse.Namespace, out: Output) -> int:
    from migration.monitor.units import parse_size
    from migration.tracee.replace import replace_with_hugepages, replaceable

    try:
        page_size = parse_size(args.page_size)
    except ValueError as error:
        raise UserError(f"--page-size: {error}") from None
    wanted = _ranges(args.hugepages)
    if args.hugepages == "all":
        wanted = replaceable(args.pid, page_size)
    if not wanted:
        raise UserError(f"process {args.pid} has no mapping with whole pages of {args.page_size}")
    for start, end in wanted:
        done = replace_with_hugepages(args.pid, start, end - start, page_size)
        out.emit(
            {
                "kind": "replaced",
                "start": start,
                "end": end,
                "page_size": page_size,
                "copied": done.copied,
                "stopped_ms": round(done.stopped_ms, 3),
            }
        )
        out.say(
            f"{start:x}-{end:x} is made of {_size(page_size)} pages now; {_size(done.copied)} "
            f"copied, the process stood still for {done.stopped_ms:.1f} ms"
        )
    return 0


def _ranges(text: str) -> list[tuple[int, int]]:
    """:raises UserError: no range."""
    from migration.monitor.units import parse_size

    if text == "all":
        return [(0, 1 << 63)]
    match = re.fullmatch(r"(?:0x)?([0-9a-fA-F]+)([-+])(\S+)", text)
    if match:
        start = int(match[1], 16)
        try:
            end = int(match[3], 16) if match[2] == "-" else start + parse_size(match[3])
        except ValueError:
            end = 0
        if end > start:
            return [(start, end)]
    raise UserError(
        f"{text!r} is no range", hint="START-END or START+LENGTH, as in 7f1200000000+64M"
    )
