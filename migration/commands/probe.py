"""``postcopy probe``: what this kernel, host and user can do, and what would change it."""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .output import Output, UserError

if TYPE_CHECKING:
    from migration.probe import Limits, Report

STATUS_READY, STATUS_MISSING, STATUS_USAGE = 0, 1, 2
_PIPE_COLUMNS = 100

_DESCRIPTION = """\
Finds out by doing it, each thing in a process of its own: opens a userfaultfd every way there is,
tries every feature bit and every ioctl on every kind of memory, takes huge pages out of the pools,
runs a guest of three instructions, and looks at limits and restrictions. Never compares versions.
Changes nothing on the host. A check that crashes or hangs loses its own row.

Without --for, rows are shown by who needs them: required, for huge pages, for shared memory, for
KVM, optional. Each says yes, no or untested; if not yes, the reason, and the command that changes
it. Runs without root too, and says what root would add."""

_EPILOG = """\
examples:
  postcopy probe                              the whole letter
  postcopy probe --for qemu-postcopy          what QEMU's postcopy needs, and nothing else
  postcopy probe --feature WP_ASYNC -q        for scripts: exit status only
  postcopy probe --as libvirt-qemu            what that user can do here (as root)
  postcopy probe --feature 'copy-*'           all rows of that pattern
  postcopy probe --list                       the names of all rows
  postcopy probe --json | jq -c 'select(.record == "row" and .status == "no") | [.row, .reason]'

--json prints a host, rows, and a verdict, one object per line:
  {"record": "row", "row": "move-anon", "title": …, "tier": "required" | "hugepages" |
   "shared-memory" | "kvm" | "optional", "group": …, "status": "yes" | "no" | "untested",
   "detail": …, "cause": …, "reason": …, "remedy": …, "since": "6.8", "need": "required" | "wanted"}

exit status: 0 ready (or: every --feature says yes), 1 a required part is missing (or: a --feature
says no or untested), 2 usage: no such feature"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    from migration.probe.purposes import DEFAULT, PURPOSES

    purposes = "\n".join(f"  {name:<16}{purpose.title}" for name, purpose in PURPOSES.items())
    parser = subparsers.add_parser(
        "probe",
        help="what this kernel and host support, with reason and remedy",
        description=_DESCRIPTION,
        epilog=f"purposes of --for (default {DEFAULT}):\n{purposes}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one object per line on stdout")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--for", dest="purpose", choices=PURPOSES, metavar="NAME", help="only what this takes"
    )
    what.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="NAME",
        help="only this row (a name, a feature bit, a pattern); may be given more than once",
    )
    what.add_argument("--list", action="store_true", help="the names of all rows; asks nothing")
    add("--as", dest="user", metavar="USER", help="ask as this user, with its groups (takes root)")
    add("-q", "--quiet", action="store_true", help="no text: the exit status is the answer")
    add("--thorough", action="store_true", help="also what takes seconds: filling 1 GiB pages")
    add(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="for one check, before it is killed and its row lost (default 2)",
    )
    parser.set_defaults(func=run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= 600.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time between 0 and 600 seconds")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Ask, print, and return the exit status.

    :raises UserError: there is no such row (status 2), or not a single question could be put.
    """
    from migration.probe.session import TIMEOUT_S, Limits, ProbeError, UnknownRow

    output = Output(json_lines=args.json)
    _check_user(args.user)
    # Who names rows of 1 GiB pages means them.
    is_thorough = args.thorough or bool(args.feature) or args.purpose == "hugetlb-1g"
    limits = Limits(timeout_s=args.timeout or TIMEOUT_S, is_thorough=is_thorough)
    try:
        if args.list:
            return _list(output)
        if args.feature:
            return _features(args, output, limits)
        return _letter(args, output, limits)
    except UnknownRow as error:
        near = f"--feature {error.nearest[0]}" if error.nearest else "postcopy probe --list"
        raise UserError(str(error), hint=near, status=STATUS_USAGE) from None
    except ProbeError as error:
        raise UserError(
            f"nothing could be tried: {error}", hint="a built package: make setup"
        ) from None


def _check_user(name: str | None) -> None:
    if name is None:
        return
    try:
        pwd.getpwnam(name)
    except KeyError:
        raise UserError(f"there is no user {name!r}", status=STATUS_USAGE) from None
    if os.geteuid() != 0:
        raise UserError("--as takes root", hint="sudo postcopy probe", status=STATUS_USAGE)


def _letter(args: argparse.Namespace, output: Output, limits: Limits) -> int:
    from migration.probe.letter import Letter
    from migration.probe.purposes import DEFAULT
    from migration.probe.report import probe

    everything = args.purpose is None
    purpose = args.purpose or DEFAULT
    report = probe(purpose, everything=everything, user=args.user, limits=limits)
    for record in report.records():
        output.emit(record)
    if not args.quiet and not args.json:
        letter = Letter(report, width=_width(output), with_names=args.verbose > 0)
        _print(letter.lines(everything=everything), output)
    return STATUS_READY if report.is_ready else STATUS_MISSING


def _features(args: argparse.Namespace, output: Output, limits: Limits) -> int:
    from migration.probe.letter import Letter

    report = _report_on(args, limits)
    for row in report.rows:
        output.emit({**row.to_json(), "need": report.need(row)})
    if not args.quiet and not args.json:
        _print(Letter(report, width=_width(output), with_names=True).rows(), output)
    return STATUS_READY if all(row.is_yes for row in report.rows) else STATUS_MISSING


def _report_on(args: argparse.Namespace, limits: Limits) -> Report:
    from migration.probe.purposes import DEFAULT, PURPOSES
    from migration.probe.report import Report
    from migration.probe.session import run_checks

    found = run_checks(args.feature, user=args.user, limits=limits)
    return Report(found.host, PURPOSES[DEFAULT], found.rows)


def _list(output: Output) -> int:
    from migration.probe.catalogue import all_checks

    checks = all_checks()
    wide = max(len(check.name) for check in checks)
    for check in checks:
        output.emit({"record": "name", "row": check.name, **check.heading()})
        if not output.json_lines:
            since = f" [{check.since}]" if check.since else ""
            output.say(f"{check.name:<{wide}}  {check.title}{since}")
    return STATUS_READY


def _width(output: Output) -> int:
    return shutil.get_terminal_size().columns if output.is_terminal else _PIPE_COLUMNS


def _print(lines: Iterable[str], output: Output) -> None:
    """Plain text, or styled on a terminal."""
    if not output.is_terminal:
        output.say("\n".join(lines))
        return
    from rich.text import Text

    from migration.probe.letter import STYLES

    for line in lines:
        text = Text(line)
        for pattern, style in STYLES:
            text.highlight_regex(pattern, style)
        output.console.print(text)
