"""What the demo found: the object for machines and the picture for people."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from migration.monitor.units import format_size

from .drive import Progress
from .output import Output, histogram_lines, table_text

_LANE_WIDTH = 56
_PERCENTILES = ("p50", "p90", "p99", "max")


class DemoRun:
    """Everything seen in one run of the demo, filled in as it happens.

    :ivar source, destination: their last ``query-migrate``.
    :ivar machine: ``x-query-machine`` of the side the guest ended on (``survivor``).
    :ivar oracle: the sweep's verdict there.
    :ivar errors: what went wrong, sentences.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.source: dict[str, Any] = {}
        self.destination: dict[str, Any] = {}
        self.machine: dict[str, Any] = {}
        self.oracle: dict[str, Any] = {}
        self.survivor = ""
        self.errors: list[str] = []
        self.entered_ms: dict[str, float] = {}

    def note(self, progress: Progress) -> None:
        """Remember when each status was first seen."""
        self.entered_ms.setdefault(progress.status, progress.seconds * 1000)

    def note_exit(self, name: str, status: int | None, last_words: str) -> None:
        """A child has ended; badly, and unless it said so before, that is an error."""
        is_told = any(f"the {name} VM ended" in error for error in self.errors)
        if status not in (0, None) and not is_told:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            self.errors.append(f"the {name} VM ended with {how}: {last_words}".rstrip(": "))

    @property
    def is_ok(self) -> bool:
        """The migration completed, the guest moved, and its memory is intact."""
        return (
            not self.errors
            and self.source.get("status") == self.destination.get("status") == "completed"
            and self.survivor == "destination"
            and self.oracle.get("errors") == 0
            and self.oracle.get("pages_checked", 0) > 0
            and not self.machine.get("touch_errors")
        )

    def shape_text(self) -> str:
        """The VM in a few words."""
        args = self._args
        plural = "" if args.smp == 1 else "s"
        return (
            f"{format_size(args.ram_bytes)} of {args.backing} RAM, {args.smp} {args.vcpu} "
            f"vCPU{plural}, workload {args.workload}, connected by {args.transport}"
        )

    def failure_texts(self) -> list[str]:
        """Why it failed, most telling first."""
        reasons = list(self.errors)
        for name, info in (("destination", self.destination), ("source", self.source)):
            if "error-desc" in info:
                reasons.append(f"{name}: {info['error-desc']}")
        found = self.oracle.get("errors", 0) or self.machine.get("touch_errors", 0)
        if found:
            reasons.append(f"the oracle found {found} damaged pages")
        return reasons or [f"the migration ended as {self.source.get('status', 'not started')!r}"]

    def result(self) -> dict[str, object]:
        """The final object: the fields that scripts rely on."""
        args, ours = self._args, self._ours(self.destination)
        latency = self.machine.get("fault_latency_us", {})
        result: dict[str, object] = {
            "result": "ok" if self.is_ok else "failed",
            "kernel": os.uname().release,
            "backing": args.backing,
            "transport": args.transport,
            "vcpus": args.smp,
            "vcpu_backend": args.vcpu,
            "ram_bytes": self.source.get("ram", {}).get("total", args.ram_bytes),
            "downtime_ms": self.machine.get("downtime_ms"),
            "total_ms": self.source.get("total-time"),
            "page_requests": ours.get("page-requests", 0),
            "requests_during_device_load": ours.get("requests-during-device-load", 0),
            "duplicate_requests": self._ours(self.source).get("duplicate-requests", 0),
            "dirty_tracker": self._ours(self.source).get("dirty-tracker", "none"),
            "pages_copied": ours.get("pages-copied", 0),
            "pages_zero": ours.get("pages-zero", 0),
            "multifd_bytes": self.source.get("ram", {}).get("multifd-bytes", 0),
            "collapse": ours.get("collapse"),
            "fault_latency_us": {name: latency.get(name, 0) for name in _PERCENTILES},
            "oracle": {
                "pages_checked": self.oracle.get("pages_checked", 0),
                "errors": self.oracle.get("errors", 0),
            },
        }
        if not self.is_ok:
            result["failures"] = self.failure_texts()
        return result

    @staticmethod
    def _ours(info: Mapping[str, Any]) -> Mapping[str, Any]:
        found = info.get("x-postcopy", {})
        return found if isinstance(found, Mapping) else {}

    # -- the picture ------------------------------------------------------------------------------

    def lanes(self) -> list[str]:
        """Where the guest ran and where pages moved, over time; empty if it never got that far."""
        end_ms = self.entered_ms.get("completed")
        moved_ms = self.entered_ms.get("postcopy-active")
        if not end_ms or moved_ms is None:
            return []
        start_ms = self.entered_ms.get("active", 0.0)
        columns = _LANE_WIDTH / end_ms
        start, moved = round(start_ms * columns), round(moved_ms * columns)
        moved = min(max(moved, 1), _LANE_WIDTH - 1)
        rest = _LANE_WIDTH - moved
        return [
            f"  guest at the source       {'█' * moved}",
            f"  guest at the destination  {' ' * moved}{'█' * rest}",
            f"  pages move                {' ' * start}{'░' * (moved - start)}{'▓' * rest}",
            f"  {'':25} {_axis(moved, f'{moved_ms:.0f} ms', f'{end_ms:.0f} ms')}",
            "  ░ precopy   ▓ postcopy: what the guest touches first, the rest behind",
        ]

    def latency_lines(self) -> list[str]:
        """The histogram of what the guest felt."""
        counts = self.machine.get("fault_latency_log2_us", [])
        return histogram_lines(
            (_octave_label(index), int(count)) for index, count in enumerate(counts)
        )


def _octave_label(index: int) -> str:
    low = 0 if index == 0 else 1 << index
    unit, scale = ("µs", 1) if (2 << index) <= 1024 else ("ms", 1024)
    if scale == 1:
        return f"{low} .. {2 << index} {unit}"
    return f"{low // scale} .. {(2 << index) // scale} {unit}"


def _axis(moved: int, moved_text: str, end_text: str) -> str:
    """The time line under the lanes: 0, the moment the guest moved, the end; never overlapping."""
    last = _LANE_WIDTH - len(end_text)
    at = max(2, min(moved, last - 2 - len(moved_text)))
    return f"{'0'.ljust(at)}{moved_text}".ljust(last) + end_text


def show(run: DemoRun, output: Output) -> None:
    """Print what happened, for people."""
    console = output.console
    for text in run.lanes():
        console.print(text, style="cyan" if "guest at" in text else "", markup=False)
    if run.is_ok and "postcopy-active" not in run.entered_ms:
        console.print("  precopy was done before postcopy was due: see --postcopy-after")
    console.print(_figures(run), markup=False)
    lines = run.latency_lines()
    if lines:
        console.print("\n  what the guest felt at each touch of a page not yet there:")
        for text in lines:
            console.print(text, markup=False)
    console.print()
    if run.is_ok:
        checked = run.oracle["pages_checked"]
        console.print(f"  OK: all {checked:,} pages are what the guest wrote", style="bold green")
        return
    for reason in run.failure_texts():
        console.print(f"  FAILED: {reason}", style="bold red", markup=False)


def _figures(run: DemoRun) -> str:
    result: dict[str, Any] = run.result()
    latency = result["fault_latency_us"]
    rows = {
        "downtime": _ms(result["downtime_ms"]) + ", last to first guest operation",
        "total": _ms(result["total_ms"]),
        "page requests": f"{result['page_requests']:,}"
        f" ({result['requests_during_device_load']:,} while devices were loaded,"
        f" {result['duplicate_requests']:,} duplicate)",
        "pages placed": f"{result['pages_copied']:,} copied, {result['pages_zero']:,} zero",
        "huge pages": _collapse_text(result["collapse"]),
        "fault latency": "  ".join(f"{name} {latency[name]:,.0f} µs" for name in _PERCENTILES),
        "oracle": f"{result['oracle']['pages_checked']:,} pages checked,"
        f" {result['oracle']['errors']:,} errors",
        "kernel": f"{result['kernel']}, dirty pages by {result['dirty_tracker']}",
    }
    return table_text([(name, text) for name, text in rows.items() if text])


def _collapse_text(figures: dict[str, Any] | None) -> str:
    """What became of small pages; nothing when that was not asked for."""
    if figures is None:
        return ""
    if figures["state"] == "unsupported":
        return f"not to be had by MADV_COLLAPSE here ({figures.get('last-error')})"
    text = (
        f"{figures['collapsed']:,} of {figures['regions']:,} regions of 2 MiB collapsed "
        f"in {_ms(figures['elapsed-ms'])}"
    )
    return text + (f", last error: {figures['last-error']}" if "last-error" in figures else "")


def _ms(value: object) -> str:
    return f"{value:,.1f} ms" if isinstance(value, int | float) else "unknown"
