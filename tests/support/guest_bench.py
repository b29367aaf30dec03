"""unpark and relay against QEMU's own postcopy: the same guest, the same run, turn by turn.

What is timed is what a user waits for: from the command to the destination's RESUME event, to its
``completed``; and how long the guest itself waited for pages, by its own clock. Run by
``scripts/bench-park``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tests.support.guest_hops import Verb, listen, park, start_verb, way
from tests.support.guest_image import layout_for
from tests.support.guest_vm import GuestOptions, GuestVM
from tests.support.qemu import MIB, QemuBinary, newer_qemu, require_qemu

FAULT_US = 10.0  # a first touch that took longer than this waited for a page

_TSC_PROGRAM = """
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>
int main(void) {
	struct timespec a, b;
	clock_gettime(CLOCK_MONOTONIC, &a);
	unsigned long long t = __rdtsc();
	do clock_gettime(CLOCK_MONOTONIC, &b);
	while ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec) < 1e8);
	printf("%f", (__rdtsc() - t) / ((b.tv_sec - a.tv_sec) * 1e6 + (b.tv_nsec - a.tv_nsec) / 1e3));
}
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One way of one guest. Times in ms, latencies in us.

    :ivar running_ms: until the guest ran at the destination.
    :ivar total_ms: until the destination had everything.
    :ivar requests: pages the destination asked for.
    """

    way: str
    ram_mib: int
    running_ms: float
    total_ms: float
    faults: int
    p50_us: float
    p99_us: float
    requests: int

    @property
    def throughput(self) -> float:
        """Guest RAM per time, zero pages too, MB/s."""
        return self.ram_mib * MIB / self.total_ms / 1e3


def ticks_per_us() -> float:
    """Of the TSC, which TCG hands through."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "tsc.c", Path(folder) / "tsc"
        source.write_text(_TSC_PROGRAM)
        subprocess.run(["gcc", "-O1", "-o", str(program), str(source)], check=True)
        return float(subprocess.run([str(program)], capture_output=True, check=True).stdout)


def touch_times(lines: list[str], rate: float) -> list[float]:
    """First touches of two passes that took long, us: the guest's own histogram, by bucket."""
    found: list[float] = []
    for line in [line for line in lines if line.startswith("L ")][:2]:
        words = line.replace(":", " ").split()[1:]
        for bucket, count in zip(words[::2], words[1::2], strict=True):
            exponent, step = divmod(int(bucket, 16), 8)
            ticks = (1 << exponent) * (1 + (step + 0.5) / 8)
            if ticks / rate >= FAULT_US:
                found += [ticks / rate] * int(count, 16)
    return sorted(found)


def moment(vm: GuestVM, name: str, status: str = "") -> float:
    """When an event happened, seconds of the wall clock, as QEMU stamped it."""
    for event in vm.qmp.events:
        if event["event"] == name and event.get("data", {}).get("status", "") == status:
            stamp = event["timestamp"]
            return float(stamp["seconds"] + stamp["microseconds"] / 1e6)
    raise AssertionError(f"no {name} {status}: {vm.qmp.event_names()}")


def asked_of(source: GuestVM) -> int:
    """Pages a QEMU was asked for."""
    source.wait_status("completed")
    return int(source.query_migrate()["ram"]["postcopy-requests"])


class Bench:
    """One RAM size."""

    def __init__(self, binary: QemuBinary, ram_mib: int, rate: float, folder: Path) -> None:
        self.binary = binary
        self.ram_mib = ram_mib
        self.rate = rate
        self.options = GuestOptions(layout_for(ram_mib * MIB, is_timed=True))
        self.parked = folder / f"vm-{ram_mib}"
        with self.source() as vm:
            park(vm, self.parked, "postcopy", "unix")

    @contextmanager
    def source(self) -> Iterator[GuestVM]:
        with GuestVM(self.binary, self.options) as vm:
            vm.serial.wait_passes(2)
            if self.binary.version < (9, 0):
                vm.execute("stop")
            yield vm

    def finished(self, name: str, vm: GuestVM, start: float, requests: Callable[[], int]) -> Run:
        """What the destination says about it.

        :param requests: how many pages it asked for, once all is over.
        """
        vm.wait_status("completed")
        vm.assert_runs_clean(3)
        waits = touch_times(vm.serial.lines, self.rate) or [0.0]
        return Run(
            name,
            self.ram_mib,
            (moment(vm, "RESUME") - start) * 1e3,
            (moment(vm, "MIGRATION", "completed") - start) * 1e3,
            len(waits),
            waits[len(waits) // 2],
            waits[int(len(waits) * 0.99)],
            requests(),
        )

    def qemu(self) -> Run:
        """QEMU to QEMU, switched to postcopy at once."""
        with self.source() as source, GuestVM(self.binary, self.options, incoming="defer") as vm:
            for each in (source, vm):
                each.set_capabilities("postcopy-ram")
            uri = f"unix:{vm.folder}/m"
            vm.execute("migrate-incoming", uri=uri)
            source.set_parameters(max_bandwidth=1 << 20)
            start = time.time()
            source.execute("migrate", uri=uri)
            source.execute("migrate-start-postcopy")
            return self.finished("QEMU to QEMU, postcopy", vm, start, lambda: asked_of(source))

    def unpark(self) -> Run:
        """From disk. Starting Python is no part of it: from when the verb begins to send."""
        with ExitStack() as stack:
            vm = stack.enter_context(GuestVM(self.binary, self.options, incoming="defer"))
            way_ = stack.enter_context(way("unix", to_us=False))
            uri = listen(vm, way_)
            words = ("unpark", "--clone", "--force", str(self.parked), uri)
            verb = stack.enter_context(Verb(*words))
            result = verb.succeed()
            start = float(result["began_unix_s"])
            return self.finished("unpark", vm, start, lambda: int(result["page_requests"]))

    def relay(self) -> Run:
        with ExitStack() as stack:
            source = stack.enter_context(self.source())
            vm = stack.enter_context(GuestVM(self.binary, self.options, incoming="defer"))
            out = stack.enter_context(way("unix", to_us=False))
            in_ = stack.enter_context(way("unix", to_us=True))
            relay, here = start_verb("relay", in_, listen(vm, out))
            stack.enter_context(relay)
            source.set_capabilities("postcopy-ram")
            source.set_parameters(max_bandwidth=1 << 20)
            start = time.time()
            source.execute("migrate", uri=here)
            source.execute("migrate-start-postcopy")
            return self.finished("relay", vm, start, lambda: int(relay.succeed()["page_requests"]))


def summary(runs: list[Run]) -> list[str]:
    """A Markdown table of medians."""
    lines = [
        "| RAM | way | guest runs after | all there after | RAM per second | asked for "
        "| long touches | p50 | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key in dict.fromkeys((run.ram_mib, run.way) for run in runs):
        these = [run for run in runs if (run.ram_mib, run.way) == key]

        def of(field: Callable[[Run], float], these: list[Run] = these) -> float:
            return median(field(run) for run in these)

        lines.append(
            f"| {key[0]} MiB | {key[1]} | {of(lambda r: r.running_ms):.1f} ms "
            f"| {of(lambda r: r.total_ms):.0f} ms | {of(lambda r: r.throughput):.0f} MB/s "
            f"| {of(lambda r: r.requests):.0f} | {of(lambda r: r.faults):.0f} "
            f"| {of(lambda r: r.p50_us):.0f} µs | {of(lambda r: r.p99_us):.0f} µs |"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """``--ram``, ``--runs``, ``--json``; a table, or an object per run."""
    parser = argparse.ArgumentParser(prog="bench-park", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ram", type=int, nargs="+", default=[32, 1024, 4096], metavar="MIB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    binary, rate = newer_qemu() or require_qemu(), ticks_per_us()
    folder = Path(tempfile.mkdtemp(prefix="bench-park-"))
    runs: list[Run] = []
    try:
        for ram_mib in args.ram:
            bench = Bench(binary, ram_mib, rate, folder)
            for _ in range(args.runs):
                for one in (bench.qemu, bench.unpark, bench.relay):
                    runs.append(one())
                    if args.json:
                        print(json.dumps(asdict(runs[-1])), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not args.json:
        print(f"{binary}, median of {args.runs}; long: a first touch of {FAULT_US:g} µs or more\n")
        print("\n".join(summary(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
