"""Fuzz for a while: ``python -m tests.fuzz.run [--seconds N] [--keep] [NAME...]``.

Each target runs until it has used N seconds of processor time, one after the other, on its inputs
from ``tests/fuzz/corpus`` and on what earlier runs found (``build/fuzz/corpus``). Processor time:
a busy machine gets as far as an idle one, only later. A finding ends its target and is left, as an
input that repeats it, in ``build/fuzz``. ``--keep`` adds the smallest inputs that reach new code to
the repository's corpus.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.targets import BUILD, CORPUS, PYTHON_TARGET, BuildError, c_targets, command, run

# The targets count wall time; one that gets no processor at all is given up after this much more.
_MARGIN_S = 600.0
_SLICE_S_MIN = 5
_KEPT_BYTES_MAX = 2 << 10


def main(arguments: Sequence[str]) -> int:
    """0: nothing found; 1: a finding, or a target that cannot run."""
    names = [*c_targets(), PYTHON_TARGET]
    parser = argparse.ArgumentParser(prog="tests.fuzz.run", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--seconds", type=int, default=60, help="of processor time for each (default %(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="add what was found to the corpus")
    args = parser.parse_args(arguments)
    unknown = set(args.names) - set(names)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    results = [fuzz(name, args.seconds, keep=args.keep) for name in args.names or names]
    return 0 if all(results) else 1


def fuzz(name: str, seconds: int, *, keep: bool) -> bool:
    """One target, one line of verdict; True when nothing was found."""
    if name == PYTHON_TARGET and importlib.util.find_spec("atheris") is None:
        print(f"{name:12} skipped: no atheris; remedy: pip install -r requirements/fuzz.txt")
        return True
    grown = BUILD / "corpus" / name
    grown.mkdir(parents=True, exist_ok=True)
    try:
        argv = command(name)
    except BuildError as error:
        print(f"{name:12} FAILED: {error}")
        return False
    used, units = 0.0, 0
    while used < seconds:
        slice_s = max(_SLICE_S_MIN, round(seconds - used))
        options = [f"-max_total_time={slice_s}", "-timeout=60", "-rss_limit_mb=1024"]
        options += [f"-artifact_prefix={BUILD}/{name}-", "-print_final_stats=1", "-verbosity=0"]
        before = _children_cpu_s()
        done = run([*argv, *options, str(grown), str(CORPUS / name)], timeout_s=slice_s + _MARGIN_S)
        used += _children_cpu_s() - before
        if done.returncode != 0:
            print(f"{name:12} FOUND something after {used:.0f} s:\n{done.stdout}", flush=True)
            return False
        units += _stat(done.stdout, "number_of_executed_units")
    found = len(list(grown.iterdir()))
    print(f"{name:12} clean, {units:,} inputs in {used:.0f} s of CPU, {found} kept", flush=True)
    if keep:
        _keep(name, argv, grown)
    return True


def _children_cpu_s() -> float:
    """Processor time of all children waited for, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _stat(output: str, name: str) -> int:
    for line in output.splitlines():
        if line.startswith(f"stat::{name}:"):
            return int(line.split()[-1])
    raise ValueError(f"the target ended without its statistics:\n{output}")


def _keep(name: str, argv: Sequence[str], grown: Path) -> None:
    """Small inputs only; the corpus is read by people as well."""
    for path in list(grown.iterdir()):
        if path.stat().st_size > _KEPT_BYTES_MAX:
            path.unlink()
    run([*argv, "-merge=1", "-verbosity=0", str(CORPUS / name), str(grown)], timeout_s=600)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
