"""Fuzz for a while: ``python -m tests.fuzz.run [--seconds N] [--keep] [NAME...]``.

Each target runs for N seconds, one after the other, on its inputs from ``tests/fuzz/corpus`` and on
what earlier runs found (``build/fuzz/corpus``). A finding ends its target and is left, as an input
that repeats it, in ``build/fuzz``. ``--keep`` adds the smallest inputs that reach new code to the
repository's corpus.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.targets import BUILD, CORPUS, PYTHON_TARGET, BuildError, c_targets, command, run

_MARGIN_S = 120.0
_KEPT_BYTES_MAX = 2 << 10


def main(arguments: Sequence[str]) -> int:
    """0: nothing found; 1: a finding, or a target that cannot run."""
    names = [*c_targets(), PYTHON_TARGET]
    parser = argparse.ArgumentParser(prog="tests.fuzz.run", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=int, default=60, help="for each (default %(default)s)")
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
    options = [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=1024"]
    options += [f"-artifact_prefix={BUILD}/{name}-", "-print_final_stats=1", "-verbosity=0"]
    done = run([*argv, *options, str(grown), str(CORPUS / name)], timeout_s=seconds + _MARGIN_S)
    if done.returncode != 0:
        print(f"{name:12} FOUND something:\n{done.stdout}")
        return False
    units = _stat(done.stdout, "number_of_executed_units")
    print(f"{name:12} clean, {units} inputs in {seconds} s, {len(list(grown.iterdir()))} kept")
    if keep:
        _keep(name, argv, grown)
    return True


def _stat(output: str, name: str) -> str:
    for line in output.splitlines():
        if line.startswith(f"stat::{name}:"):
            return line.split()[-1]
    return "?"


def _keep(name: str, argv: Sequence[str], grown: Path) -> None:
    """Small inputs only; the corpus is read by people as well."""
    for path in list(grown.iterdir()):
        if path.stat().st_size > _KEPT_BYTES_MAX:
            path.unlink()
    run([*argv, "-merge=1", "-verbosity=0", str(CORPUS / name), str(grown)], timeout_s=600)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
