"""The command line of ``scripts/kernel-matrix``."""

import argparse
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.matrix import debian, image, render, vm
from scripts.matrix.debian import FetchError
from scripts.matrix.render import Outcome

DEFAULT = "5.10,6.1,6.12,7.3"
_EPILOG = """\
examples:
  scripts/kernel-matrix                                   four kernels, all cases
  scripts/kernel-matrix --kernels 7.3 --only rwp/         one family on one kernel
  scripts/kernel-matrix --kernels 6.1,7.3 --markdown docs/kernel-matrix.md
  scripts/kernel-matrix --render                          draw the saved runs again, boot nothing

Kernels and the VMs' root file system come from Debian packages, by the mirror this machine's apt
uses, and are kept in the cache. VMs are emulated: expect about five minutes a kernel. For each
kernel RESULTS/SERIES holds cases.jsonl, junit.xml, steps.jsonl (probe, tests) and console.log.
Needs qemu-system-x86, mmdebstrap and the built project (make setup).
Exit status: 0 every kernel ran to its end and no case failed, 1 otherwise, 2 usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    series = [name for name in options.kernels.split(",") if name]
    if not options.render:
        if shutil.which("qemu-system-x86_64") is None:
            print(
                "kernel-matrix: no qemu-system-x86_64; run: apt-get install qemu-system-x86",
                file=sys.stderr,
            )
            return 2
        try:
            image.root(options.cache)  # once, before the VMs want it at the same time
        except FetchError as error:
            print(f"kernel-matrix: {error}", file=sys.stderr)
            return 2
        with ThreadPoolExecutor(options.jobs or _jobs(options.memory)) as pool:
            list(pool.map(lambda name: _one(name, options), series))
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
    add("--only", action="append", default=[], metavar="PATTERN", help="these cases only")
    add("--tests", action="append", default=[], metavar="PATH", help="run pytest on it there too")
    add("--no-validate", action="store_true", help="no cases: only the probe, and --tests")
    add("--cache", type=Path, default=cache / "postcopy" / "kernel-matrix", metavar="DIR")
    add("--results", type=Path, default=image.PROJECT / "build" / "kernel-matrix", metavar="DIR")
    add("--markdown", type=Path, metavar="FILE", help="the comparison (RESULTS/kernels.md)")
    add("--html", type=Path, metavar="FILE", help="the same (RESULTS/kernels.html)")
    add("--refresh", action="store_true", help="look for newer kernels")
    add("--render", action="store_true", help="boot nothing, use what RESULTS holds")
    add("--memory", type=int, default=2048, metavar="MIB", help="of a VM (2048)")
    add("--cpus", type=int, default=1, metavar="N", help="of a VM (1)")
    add("--hugepages", type=int, default=24, metavar="N", help="2 MiB pages to take there (24)")
    add("--patience", type=float, default=3.0, metavar="X", help="times the cases' limits (3)")
    add("--silence", type=float, default=300.0, metavar="SECONDS", help="a hang (300)")
    add("--limit", type=float, default=2400.0, metavar="SECONDS", help="of one VM (2400)")
    return parser


def _jobs(memory_mib: int) -> int:
    """As many VMs as there are pairs of CPUs and room for twice their memory."""
    total_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    return max(1, min((os.cpu_count() or 1) // 2, total_mib // (2 * memory_mib)))


_print = threading.Lock()


def _say(text: str) -> None:
    with _print:
        print(text, flush=True)


def _one(series: str, options: argparse.Namespace) -> None:
    """One kernel. Whatever goes wrong stays with it."""
    outcome = Outcome(series)
    try:
        _try(outcome, options)
    except (FetchError, OSError) as error:
        outcome.problem = str(error)
    render.save(options.results / series, outcome)
    cases = vm.records(options.results / series / vm.CASES)
    counts = Counter(str(r["status"]) for r in cases if r.get("type") == "case")
    state = ", ".join(f"{number} {name}" for name, number in counts.items()) or "no cases"
    state += f"; PROBLEM: {outcome.problem}" if outcome.problem else ""
    _say(f"{series} ({outcome.release or 'no kernel'}), {outcome.seconds:.0f} s: {state}")


def _try(outcome: Outcome, options: argparse.Namespace) -> None:
    folder: Path = options.results / outcome.series
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kernel = debian.fetch(outcome.series, options.cache, refresh=options.refresh)
    outcome.release = kernel.release
    plan = {
        "validate": not options.no_validate,
        "only": options.only,
        "tests": options.tests,
        "patience": options.patience,
        "hugepages": options.hugepages,
    }
    initramfs, disk = image.build(kernel, plan, options.cache, folder), vm.make_disk(folder)
    _say(f"{outcome.series}: booting {kernel.release}")
    try:
        line = vm.command(kernel.vmlinuz, initramfs, disk, folder, options.memory, options.cpus)
        boot = vm.run(line, folder, vm.Limits(options.silence, options.limit))
    finally:
        initramfs.unlink()
        disk.unlink()
    outcome.seconds, outcome.problem = boot.seconds, boot.problem


def _finish(series: Sequence[str], options: argparse.Namespace) -> int:
    saved = [run for run in render.load(options.results) if run.series in series]
    if not saved:
        print(f"kernel-matrix: {options.results} holds no run", file=sys.stderr)
        return 2
    render.write_html(saved, options.html or options.results / "kernels.html")
    markdown = options.markdown or options.results / "kernels.md"
    render.write_markdown(saved, markdown)
    render.merge_junit(saved, options.results / "junit.xml")
    _say(f"written: {markdown}")
    return 0 if all(run.is_good for run in saved) else 1
