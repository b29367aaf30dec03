"""The command ``postcopy``: finds the verbs, hands over, turns errors into sentences.

A verb is a module here with ``add_parser(subparsers)`` and ``run(args) -> int``. Only the module of
the verb that was asked for is imported, and each imports its heavy parts inside ``run``, so
``--help`` is quick and a verb whose parts are missing on this host does not take the others down.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence

from .output import UserError

VERBS: tuple[str, ...] = (
    "demo",
    "run",
    "migrate",
    "probe",
    "analyze",
    "park",
    "unpark",
    "parked",
    "relay",
    "bench",
    "inspect",
    "hugepages",
)
STATUS_INTERRUPTED = 130
STATUS_USAGE = 2
_OWN_ROOMS = frozenset({"migration", "guestmem", "uffd"})
_EPILOG = """\
examples:
  postcopy demo                      a live postcopy migration between two processes, here and now
  postcopy probe                     what this kernel and host support
  postcopy run --qmp unix:vm.qmp     a toy VM to play with
  postcopy VERB --help               the manual of a verb
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser(words).parse_args(words)
    if not hasattr(args, "func"):
        _parser([]).print_help(sys.stderr)
        return STATUS_USAGE
    try:
        status = args.func(args)
        sys.stdout.flush()
        return int(status)
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except BrokenPipeError:
        # the reader of our output has gone; nothing more can be said there, also not at exit
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the one place that turns any failure into words
        return _report(error, args.verb, verbosity=getattr(args, "verbose", 0))


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser with the verbs that matter for this command line."""
    parser = argparse.ArgumentParser(
        prog="postcopy",
        description="Live postcopy migration on userfaultfd, in QEMU's stream format.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    _add_verbose(parser, default=0)
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in _wanted(words):
        module = importlib.import_module(f"{__package__}.{verb}")
        module.add_parser(subparsers)
    for sub in set(subparsers.choices.values()):
        # -v after the verb too; a verb that has its own keeps it
        with contextlib.suppress(argparse.ArgumentError):
            _add_verbose(sub, default=argparse.SUPPRESS)
    return parser


def _add_verbose(parser: argparse.ArgumentParser, *, default: object) -> None:
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=default,
        help="say more; -vv shows tracebacks and debug messages",
    )


def _wanted(words: Sequence[str]) -> list[str]:
    present = [verb for verb in VERBS if importlib.util.find_spec(f"{__package__}.{verb}")]
    for word in words:
        if not word.startswith("-"):
            return [word] if word in present else present
    return present


class _Version(argparse.Action):
    """``--version`` that looks the version up only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from migration.monitor.version import package

        print(package())
        parser.exit()


def _report(error: Exception, verb: str, *, verbosity: int) -> int:
    """Say what failed, why and what to try; the traceback only for those who asked."""
    if verbosity >= 2:
        traceback.print_exception(error)
    prefix = f"postcopy {verb}: "
    if isinstance(error, UserError):
        print(f"{prefix}{error}", file=sys.stderr)
        if error.hint:
            print(f"  try: {error.hint}", file=sys.stderr)
        return error.status
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _OWN_ROOMS:
        print(f"{prefix}{error}", file=sys.stderr)
        remedy = getattr(error, "remedy", None)
        if remedy and remedy not in str(error):
            print(f"  try: {remedy}", file=sys.stderr)
        return 1
    print(
        f"{prefix}internal error: {type(error).__name__}: {error}\n"
        f"  try: the same command with -vv shows where",
        file=sys.stderr,
    )
    return 1
