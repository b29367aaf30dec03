"""``python -m tests.chaos``: any number of runs, one after the other, counted by fault and outcome.

Each run is decided by its seed: ``--seed S --count N`` are the runs S, S+1, ... Whatever fails is
printed with the command that repeats it. ``make chaos N=... SEED=... ARGS=...`` is the same.

examples:
  a thousand runs, the results kept for the table in docs/chaos.md:
    python -m tests.chaos --count 1000 --seed 1 --results chaos.jsonl
  the same, going on where it was stopped:
    python -m tests.chaos --count 1000 --seed 1 --results chaos.jsonl --resume
  one run again, with what happened in it:
    python -m tests.chaos --seed 417 --verbose
  the table of one or more results:
    python -m tests.chaos --table chaos.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from guestmem.pools import HugepagePool
from tests.chaos import hugelimit
from tests.chaos.ends import HostLacks
from tests.chaos.forked import start_server
from tests.chaos.plan import Fault, Phase, Plan, draw
from tests.chaos.run import run
from tests.chaos.table import tables
from tests.support.e2e_leaks import nothing_left
from tests.support.guestmem_memory import HUGE


def main() -> int:
    """Exit status 0: every invariant held in every run."""
    args = _arguments()
    if args.table:
        lines = [line for name in args.table for line in Path(name).read_text().splitlines()]
        print(tables([json.loads(line) for line in lines]))
        return 0
    failed, records = [], []
    first = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    print(f"{args.count} runs, the first one's seed is {first}", file=sys.stderr)
    done = _done(args.results) if args.resume else set()
    start_server()
    for seed in range(first, first + args.count):
        if seed in done:
            continue
        plan = plan_of(seed, phase=args.phase, fault=args.fault)
        record = one(plan, args.verbose)
        records.append(record)
        if args.results:
            with open(args.results, "a") as results:
                print(json.dumps(record), file=results)
        if "violation" in record:
            failed.append(seed)
            print(f"repeat it with: {_command(args, seed)}", file=sys.stderr, flush=True)
    if len(records) > 1:
        print(tables(records))
    made = sum("lacks" not in record for record in records)
    print(f"{made - len(failed)} of {made} runs held every invariant", file=sys.stderr)
    if made < len(records):
        print(f"{len(records) - made} could not be made here, see above", file=sys.stderr)
    if failed:
        print(f"failed: {failed}", file=sys.stderr)
    return 1 if failed else 0


def _done(results: str) -> set[int]:
    """Seeds that an earlier call has results of."""
    with contextlib.suppress(FileNotFoundError):
        lines = [json.loads(line) for line in Path(results).read_text().splitlines()]
        return {line["seed"] for line in lines if "lacks" not in line}
    return set()


def plan_of(seed: int, *, phase: Phase | None = None, fault: Fault | None = None) -> Plan:
    """The seed's plan on this host."""
    return draw(
        seed,
        phase=phase,
        fault=fault,
        has_hugepages=HugepagePool(HUGE).exists,
        has_limits=hugelimit.place() is not None,
        has_kvm=os.access("/dev/kvm", os.R_OK | os.W_OK),
    )


def one(plan: Plan, verbose: bool) -> dict[str, Any]:
    """Carry a plan out; its record for the results, with ``violation`` if it failed."""
    began = time.monotonic()
    record: dict[str, Any] = {
        "seed": plan.seed, "phase": plan.phase.value, "fault": plan.fault.value,
    }  # fmt: skip
    try:
        with nothing_left():
            outcome = run(plan)
        record = outcome.as_json()
        story = outcome.story
    except HostLacks as error:
        record["lacks"] = str(error)
        story = ()
    except Exception as error:
        record["violation"] = f"{type(error).__name__}: {error}".splitlines()[0]
        story = ("".join(traceback.format_exception(error)),)
    record["seconds"] = round(time.monotonic() - began, 2)
    text = ", ".join(f"{key} {value}" for key, value in record.items())
    print(text, file=sys.stderr, flush=True)
    if verbose or "violation" in record:
        print(json.dumps(plan.as_json()), *story, sep="\n", file=sys.stderr, flush=True)
    return record


def _command(args: argparse.Namespace, seed: int) -> str:
    words = ["python", "-m", "tests.chaos", "--seed", str(seed), "--verbose"]
    for name in ("phase", "fault"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", f"'{value.value}'"]
    return " ".join(words)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=1, help="how many runs (default 1)")
    parser.add_argument("--seed", type=int, help="the first one's (default: any, it is printed)")
    parser.add_argument("--phase", type=Phase, help="hit this phase only")
    parser.add_argument("--fault", type=Fault, help="by this fault only")
    parser.add_argument("--results", help="append one JSON object a run to this file")
    parser.add_argument(
        "--resume", action="store_true", help="leave out the seeds that --results has already"
    )
    parser.add_argument("--verbose", action="store_true", help="tell what happens in each run")
    parser.add_argument("--table", nargs="+", metavar="RESULTS", help="show results as tables")
    args = parser.parse_args()
    if args.resume and (not args.results or args.seed is None):
        parser.error("--resume goes on with the same --seed and --results")
    return args


if __name__ == "__main__":
    sys.exit(main())
