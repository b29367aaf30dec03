"""The command line of ``scripts/validate-kernel``."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.validate import catching, compare, mutants, report, runner
from scripts.validate.case import FAMILIES, Case, select
from scripts.validate.host import Host
from scripts.validate.runner import FAIL, Result
from scripts.validate.stress import campaign

_EXAMPLES = """\
examples:
  scripts/validate-kernel                                  everything, TAP on standard output
  scripts/validate-kernel --only unit/ --only 'scan/*'     some; a part of the name, or a glob
  scripts/validate-kernel --json 6.18.jsonl --junit 6.18.xml
  scripts/validate-kernel --compare 6.12.jsonl 6.18.jsonl --html kernels.html
  scripts/validate-kernel --stress 30 --threads 4          random mixes against a shadow model
  scripts/validate-kernel --stress-seeds 1 --seed 4711     one of them again, step by step

Each case runs in a process of its own under a timeout. Root is needed for huge pages, swap and
faults of system calls; what cannot run is skipped with a reason and, where there is one, a remedy.
REQUIRE_KERNEL=1 makes a skip that has a remedy a failure. Huge pages are taken into the pool and
given back (journal: python -m guestmem.hugepages show). Swap is compressed memory (zram).
Exit status: 0 all passed or were skipped, 1 something failed, 2 usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.compare:
            return _compare(options)
        cases = select(options.only)
        if options.mutate in FAMILIES:
            cases = [case for case in cases if case.family == options.mutate]
        if options.list:
            return _list(cases, options)
        if options.stress is not None or options.stress_seeds is not None:
            return _stress(options)
    except BrokenPipeError:
        return 1
    except (OSError, ValueError) as error:
        print(f"validate-kernel: {error}", file=sys.stderr)
        return 2
    if not cases:
        print("validate-kernel: no case matches", file=sys.stderr)
        return 2
    return _run(cases, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="validate-kernel",
        description="Validate what userfaultfd and its neighbours do on this kernel.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="PATTERN", help="cases to run or list")
    add("--list", action="store_true", help="names and what each validates")
    add("--json", metavar="FILE", help="one object per line; - is standard output (TAP: stderr)")
    add("--junit", type=Path, metavar="FILE", help="JUnit XML")
    add("--compare", nargs="+", type=Path, metavar="RUN", help="table of saved --json runs")
    add("--markdown", type=Path, metavar="FILE", help="with --compare (default: to stdout)")
    add("--html", type=Path, metavar="FILE", help="with --compare")
    add("--stress", type=float, metavar="SECONDS", help="random mixes against a shadow model")
    add("--stress-seeds", type=int, metavar="COUNT", help="so many seeds instead of so long")
    add("--threads", type=int, default=2, metavar="N", help="stress: threads that fault (2)")
    add("--seed", type=int, metavar="S", help="stress: the first seed; default random, printed")
    add("--memory", metavar="TYPE", help="stress: one memory type; default by seed")
    add("--hugepages", type=int, default=24, metavar="N", help="2 MiB pages to take (24)")
    add("--gigantic", action="store_true", help="take a 1 GiB page too, for the cases about it")
    add("--journal", type=Path, metavar="DIR", help="of the huge pages; default /run")
    add(
        "--mutate",
        choices=[*FAMILIES, *sorted(mutants.MUTANTS)],
        metavar="FAMILY|DEFECT",
        help="FAMILY: run its cases on broken kernels too; a case passes that catches a defect. "
        "DEFECT: pretend that this kernel has it (--list-mutants)",
    )
    add("--list-mutants", action=_ListMutants, nargs=0, help="the defects, and exit")
    return parser


class _ListMutants(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        for name, mutant in mutants.MUTANTS.items():
            print(f"{name:<24} {', '.join(mutant.families):<28} {mutant.summary}")
        parser.exit()


def _list(cases: Sequence[Case], options: argparse.Namespace) -> int:
    for case in cases:
        print(f"{case.id:<52} {case.summary}")
    return 0


def _end_when_told() -> None:
    """SIGTERM gives back huge pages, swap and settings like any other end, once."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def _run(cases: Sequence[Case], options: argparse.Namespace) -> int:
    _end_when_told()
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        host = Host(
            hugepages=options.hugepages,
            journal=options.journal,
            gigantic=options.gigantic or runner.is_strict(),
        )
        stack.callback(host.close)
        tap = report.Tap(sys.stderr if options.json == "-" else sys.stdout, len(cases))
        lines = None
        if options.json == "-":
            lines = report.JsonLines(sys.stdout, host)
        elif options.json:
            lines = report.JsonLines(stack.enter_context(open(options.json, "w")), host)
        for result in _results(cases, host, options.mutate):
            results.append(result)
            tap.add(result)
            if lines is not None:
                lines.add(result)
        tap.end(results)
        if options.junit:
            report.write_junit(options.junit, results, host)
    return int(any(result.status == FAIL for result in results))


def _results(cases: Sequence[Case], host: Host, mutate: str | None) -> Iterator[Result]:
    if mutate in FAMILIES:
        return catching.catch_all(cases, host)
    return runner.run(cases, host, mutant=mutate)


def _compare(options: argparse.Namespace) -> int:
    runs = [compare.load(path) for path in options.compare]
    if options.html:
        options.html.write_text(compare.html_page(runs))
    if options.markdown:
        options.markdown.write_text(compare.markdown(runs))
    elif not options.html:
        print(compare.markdown(runs), end="")
    regressions = [row for row in compare.table(runs) if any(c.is_regression for c in row.cells)]
    for row in regressions:
        print(f"regression: {row.case}", file=sys.stderr)
    return int(bool(regressions))


def _stress(options: argparse.Namespace) -> int:
    _end_when_told()
    host = Host(hugepages=options.hugepages, journal=options.journal)
    try:
        outcome = campaign.run(
            host,
            campaign.Plan(
                seconds=options.stress,
                seeds=options.stress_seeds,
                threads=options.threads,
                first_seed=options.seed,
                memory=options.memory,
                mutant=options.mutate,
            ),
            say=lambda line: print(line, flush=True),
        )
    finally:
        host.close()
    return 0 if outcome else 1
