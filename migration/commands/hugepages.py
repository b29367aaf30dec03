"""``postcopy hugepages``: pools of huge pages and file systems of them."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb; what it can do is :mod:`guestmem.hugepages`' own."""
    from guestmem.hugepages import add_commands

    parser = subparsers.add_parser(
        "hugepages", help="huge page pools: show, reserve, give back, mount", allow_abbrev=False
    )
    add_commands(parser, "postcopy hugepages")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run it; 0 done, 1 refused."""
    from guestmem.hugepages import run as run_command

    return run_command(args)
