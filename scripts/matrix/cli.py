"""The command line of ``scripts/kernel-matrix``."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.matrix import debian, explain, image, jobs, junit, render, runs, vm
from scripts.matrix.debian import FetchError
from scripts.matrix.migrations import NEEDS

DEFAULT = "5.10,6.1,6.12,7.3"
# A few of each family: what every migration stands on, and what old kernels do otherwise.
SHORT_CASES = ("unit/register-ioctls", "unit/copy", "unit/zeropage", "unit/events")
_EPILOG = """\
examples:
  scripts/kernel-matrix                                   four kernels, all cases
  scripts/kernel-matrix --kernels 7.3 --only rwp/         one family on one kernel
  scripts/kernel-matrix --kernels 5.10,7.3 --short        a few minutes, what CI does
  scripts/kernel-matrix --no-validate --cross 5.10,6.1    migrations between two kernels
  scripts/kernel-matrix --render                          draw the saved runs again, boot nothing
  scripts/kernel-matrix --kernels 5.10,7.3 --fetch        only fetch what booting needs

Kernels and the VMs' root file system come from Debian packages, by the mirror this machine's apt
uses, and are kept in the cache. VMs are emulated: expect about five minutes a kernel. A VM whose
files are the same as last time is not booted again, unless --fresh. For each kernel RESULTS/SERIES
holds cases.jsonl, junit.xml, steps.jsonl (probe, demo, tests) and console.log; RESULTS/crossings
the same for pairs of VMs; RESULTS/junit.xml is all of it.
Needs qemu-system-x86, mmdebstrap and the built project (make setup).
Exit status: 0 every kernel ran to its end, the toy VM moved, and what failed is explained by what
is known of that kernel; 1 otherwise; 2 usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    series = [name for name in options.kernels.split(",") if name]
    pairs = _pairs(options, series)
    if not options.render:
        missing = [tool for tool in ("qemu-system-x86_64", "mmdebstrap") if not shutil.which(tool)]
        if missing:
            print(
                f"kernel-matrix: no {' and no '.join(missing)}; "
                "run: apt-get install qemu-system-x86 mmdebstrap",
                file=sys.stderr,
            )
            return 2
        try:
            image.root(options.cache)  # once, before the VMs want it at the same time
            for name in dict.fromkeys([*series, *(name for pair in pairs for name in pair)]):
                if options.fetch:
                    debian.fetch(name, options.cache, refresh=options.refresh)
        except FetchError as error:
            print(f"kernel-matrix: {error}", file=sys.stderr)
            return 2
        if options.fetch:
            return 0
        _boot_all(series, pairs, options)
    return _finish(series, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kernel-matrix",
        description="Validate several kernels, each in a VM, and put them side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    add = parser.add_argument
    add("--kernels", default=DEFAULT, metavar="SERIES,...", help=f"default {DEFAULT}")
    add("--jobs", type=int, default=0, metavar="N", help="VMs at a time (by CPUs and memory)")
    add("--short", action="store_true", help="few cases, anonymous RAM only, no tests")
    add("--only", action="append", default=[], metavar="PATTERN", help="these cases only")
    add("--tests", action="append", default=[], metavar="PATH", help="run pytest on it there too")
    add("--no-validate", action="store_true", help="no cases: only the probe, demo and --tests")
    add(
        "--cross",
        action="append",
        metavar="A,B",
        help="migrate between these two, both ways (default: oldest and newest; 'none': not)",
    )
    add("--cache", type=Path, default=cache / "postcopy" / "kernel-matrix", metavar="DIR")
    add("--results", type=Path, default=image.PROJECT / "build" / "kernel-matrix", metavar="DIR")
    add("--markdown", type=Path, metavar="FILE", help="the comparison (RESULTS/kernels.md)")
    add("--html", type=Path, metavar="FILE", help="the same (RESULTS/kernels.html)")
    add("--fetch", action="store_true", help="fetch and build what booting needs, boot nothing")
    add("--refresh", action="store_true", help="look for newer kernels")
    add("--fresh", action="store_true", help="boot again also where nothing has changed")
    add("--render", action="store_true", help="boot nothing, use what RESULTS holds")
    add("--memory", type=int, default=2048, metavar="MIB", help="of a VM (2048)")
    add("--cpus", type=int, default=1, metavar="N", help="of a VM (1)")
    add("--nodes", type=int, default=1, metavar="N", help="NUMA nodes of a VM (1)")
    add("--hugepages", type=int, default=24, metavar="N", help="2 MiB pages to take there (24)")
    add("--patience", type=float, default=3.0, metavar="X", help="times the cases' limits (3)")
    add("--silence", type=float, default=400.0, metavar="SECONDS", help="a hang (400)")
    add("--limit", type=float, default=2400.0, metavar="SECONDS", help="of one VM (2400)")
    return parser


def _pairs(options: argparse.Namespace, series: Sequence[str]) -> list[tuple[str, str]]:
    """Which kernels migrate to each other."""
    if options.cross is None:
        ordered = sorted(series, key=explain.numbers)
        return [(ordered[0], ordered[-1])] if len(ordered) > 1 else []
    asked = [tuple(text.split(",")) for text in options.cross if text != "none"]
    return [(pair[0], pair[-1]) for pair in asked]


def _boot_all(
    series: Sequence[str], pairs: Sequence[tuple[str, str]], options: argparse.Namespace
) -> None:
    limits = vm.Limits(options.silence, options.limit)
    settings = jobs.Settings(
        options.cache,
        options.results,
        options.memory,
        options.cpus,
        limits,
        options.refresh,
        options.fresh,
        options.nodes,
    )
    kinds = ["anon"] if options.short else list(NEEDS)
    plan = {
        "validate": not options.no_validate,
        "only": options.only or (list(SHORT_CASES) if options.short else []),
        "tests": options.tests,
        "demos": kinds,
        "patience": options.patience,
        "hugepages": options.hugepages,
    }
    at_once = options.jobs or _jobs(options.memory)
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda name: jobs.one(name, plan, settings), series))
    for pair in pairs:
        moves = [
            {"backing": kind, "source": a, "destination": b}
            for kind in kinds
            for a, b in (pair, pair[::-1])
        ]
        crossing = {**plan, "validate": False, "tests": [], "demos": [], "moves": moves}
        jobs.two(pair, crossing, settings)


def _jobs(memory_mib: int) -> int:
    """As many VMs as there are CPUs and room for twice their memory."""
    total_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    return max(1, min(os.cpu_count() or 1, total_mib // (2 * memory_mib)))


def _finish(series: Sequence[str], options: argparse.Namespace) -> int:
    saved = [run for run in runs.load(options.results) if run.series in series]
    crossings = runs.load_crossings(options.results)
    if not saved and not crossings:
        print(f"kernel-matrix: {options.results} holds no run", file=sys.stderr)
        return 2
    markdown = options.markdown or options.results / "kernels.md"
    html = options.html or options.results / "kernels.html"
    render.write(saved, crossings, markdown, html)
    junit.write(saved, crossings, options.results / "junit.xml")
    jobs.say(f"written: {markdown} and {html}")
    is_good = all(run.is_good for run in saved) and all(move.is_good for move in crossings)
    return 0 if is_good else 1
