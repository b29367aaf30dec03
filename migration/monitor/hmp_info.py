"""What the ``info`` commands show: plain text from the same values QMP gives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from .units import format_size
from .version import QEMU_SURFACE, package

_UNITS: Mapping[str, str] = {
    "announce-initial": "ms",
    "announce-max": "ms",
    "announce-step": "ms",
    "downtime-limit": "ms",
    "x-checkpoint-delay": "ms",
    "x-vcpu-dirty-limit-period": "ms",
    "vcpu-dirty-limit": "MB/s",
    "max-bandwidth": "bytes/second",
    "avail-switchover-bandwidth": "bytes/second",
    "max-postcopy-bandwidth": "bytes/second",
    "xbzrle-cache-size": "bytes",
}
_RAM_ROWS: tuple[tuple[str, str, str], ...] = (
    ("transferred", "transferred ram", "bytes"),
    ("remaining", "remaining ram", "bytes"),
    ("total", "total ram", "bytes"),
    ("duplicate", "zero pages", "pages"),
    ("normal", "normal pages", "pages"),
    ("normal-bytes", "normal bytes", "bytes"),
    ("mbps", "throughput", "mbps"),
    ("dirty-pages-rate", "dirty pages rate", "pages/s"),
    ("pages-per-second", "pages per second", ""),
    ("dirty-sync-count", "dirty sync count", ""),
    ("page-size", "page size", "bytes"),
    ("precopy-bytes", "precopy ram", "bytes"),
    ("downtime-bytes", "downtime ram", "bytes"),
    ("postcopy-bytes", "postcopy ram", "bytes"),
    ("postcopy-requests", "postcopy request count", ""),
    ("multifd-bytes", "multifd bytes", "bytes"),
)
_TIMES: tuple[tuple[str, str], ...] = (
    ("total-time", "total time"),
    ("expected-downtime", "expected downtime"),
    ("downtime", "downtime"),
    ("setup-time", "setup"),
)


def switch_text(value: object) -> str:
    """A value as the monitor prints it: booleans as on/off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"'{value}'" if value == "" else str(value)


def capabilities_text(capabilities: Mapping[str, bool]) -> str:
    """``info migrate_capabilities``."""
    return "\n".join(f"{name}: {switch_text(state)}" for name, state in capabilities.items())


def parameters_text(parameters: Mapping[str, object]) -> str:
    """``info migrate_parameters``."""
    return "\n".join(
        f"{name}: {switch_text(value)} {_UNITS.get(name, '')}".rstrip()
        for name, value in parameters.items()
    )


def dirty_rate_text(query: Mapping[str, object]) -> str:
    """``info dirty_rate``."""
    lines = [f"Status: {query['status']}"]
    if query["status"] != "unstarted":
        lines += [
            f"Start Time: {query['start-time']} (sec)",
            f"Sample Pages: {query['sample-pages']} (per GB)",
            f"Period: {query['calc-time']} (sec)",
            f"Mode: {query['mode']}",
        ]
        measured = query.get("dirty-rate")
        lines.append(f"Dirty rate: {'(not ready)' if measured is None else f'{measured} (MB/s)'}")
    return "\n".join(lines)


def status_text(run_state: str) -> str:
    """``info status``: ``running``, or ``paused`` with the reason in brackets."""
    if run_state in ("running", "paused"):
        return f"VM status: {run_state}"
    return f"VM status: paused ({run_state})"


def snapshots_text(snapshots: Sequence[Mapping[str, object]]) -> str:
    """``info snapshots``: QEMU's columns, then what kind of file it is."""
    if not snapshots:
        return "There is no snapshot available."
    lines = [f"{'TAG':<24} {'VM SIZE':>10} {'DATE':<19} {'VM CLOCK':>13}  KIND"]
    for info in snapshots:
        date = datetime.fromtimestamp(_whole(info["date-sec"]), UTC).astimezone()
        kind = [str(info.get(key)) for key in ("machine", "layout", "run-state") if key in info]
        lines.append(
            f"{info['name']!s:<24} {format_size(_whole(info['vm-state-size'])):>10} "
            f"{date:%Y-%m-%d %H:%M:%S} {_clock(info.get('vm-clock-nsec')):>13}  "
            + (", ".join(kind) or "without checksum")
        )
    return "\n".join(lines)


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _clock(value: object) -> str:
    if not isinstance(value, int):
        return "-"
    seconds, rest = divmod(value, 1_000_000_000)
    return (
        f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{rest // 1_000_000:03d}"
    )


def name_text(name: str | None) -> str:
    """``info name``."""
    return name or ""


def version_text() -> str:
    """``info version``."""
    surface = ".".join(str(QEMU_SURFACE[part]) for part in ("major", "minor", "micro"))
    return f"{package()}, monitor as of QEMU {surface}"


def migration_text(query: Mapping[str, object], *, everything: bool) -> str:
    """``info migrate`` from ``query-migrate``'s answer; ``everything`` adds our own fields."""
    if "status" not in query:
        return "No migration so far"
    lines = list(_migration_lines(query))
    if everything and "x-postcopy" in query:
        lines.append("x-postcopy: " + json.dumps(query["x-postcopy"], indent=2, sort_keys=True))
    return "\n".join(lines)


def _migration_lines(query: Mapping[str, object]) -> Iterable[str]:
    cause = query.get("error-desc")
    yield f"Migration status: {query['status']}" + (f" ({cause})" if cause else "")
    for name, label in _TIMES:
        if name in query:
            yield f"{label}: {query[name]} ms"
    for reason in _strings(query.get("blocked-reasons")):
        yield f"blocked: {reason}"
    if "cpu-throttle-percentage" in query:
        yield f"cpu throttle percentage: {query['cpu-throttle-percentage']} %"
    ram = query.get("ram")
    if isinstance(ram, Mapping):
        for name, label, unit in _RAM_ROWS:
            if name in ram:
                yield f"{label}: {_figure(ram[name])} {unit}".rstrip()
    if "socket-address" in query:
        yield f"socket address: {json.dumps(query['socket-address'])}"
    if "postcopy-blocktime" in query:
        yield f"postcopy blocktime: {query['postcopy-blocktime']} ms"
    if "postcopy-vcpu-blocktime" in query:
        per_vcpu = ",".join(_strings(query["postcopy-vcpu-blocktime"]))
        yield f"postcopy vcpu blocktime: {per_vcpu} ms"
    if "postcopy-latency" in query:
        yield f"postcopy latency: {query['postcopy-latency']} ns"
    if "postcopy-vcpu-latency" in query:
        per_vcpu = ",".join(_strings(query["postcopy-vcpu-latency"]))
        yield f"postcopy vcpu latency: {per_vcpu} ns"
        yield f"postcopy non-vcpu latency: {query.get('postcopy-non-vcpu-latency', 0)} ns"
    if "postcopy-latency-dist" in query:
        yield from _latency_lines(query["postcopy-latency-dist"])


def _latency_lines(counts: object) -> Iterable[str]:
    """The distribution, one power of two microseconds a line, from the first count to the last."""
    if not isinstance(counts, list) or not any(counts):
        return
    used = [index for index, count in enumerate(counts) if count]
    yield "postcopy latency distribution:"
    for index in range(used[0], used[-1] + 1):
        yield f"  [{1 << index} us, {2 << index} us): {counts[index]}"


def _strings(values: object) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def _figure(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def memdev_text(devices: Sequence[Mapping[str, object]]) -> str:
    """``info memdev``: QEMU's rows, then page size and where the pages lie."""
    parts = []
    for device in devices:
        nodes = device["host-nodes"]
        assert isinstance(nodes, list)
        rows = [
            f"memory backend: {device['id']}",
            f"  size:  {device['size']}",
            *(
                f"  {name}: {str(device[name]).lower()}"
                for name in ("merge", "dump", "prealloc", "share", "reserve")
            ),
            f"  policy: {device['policy']}",
            f"  host nodes: {','.join(map(str, nodes))}".rstrip(),
            f"  page size: {format_size(int(str(device['x-page-size'])))}",
        ]
        by_node = device["x-bytes-by-node"]
        assert isinstance(by_node, dict)
        rows += [f"  on node {node}: {format_size(size)}" for node, size in by_node.items()]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)
