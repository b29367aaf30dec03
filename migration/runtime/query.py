"""``query-migrate``: the figures of one migration by QEMU's names, and ours under ``x-postcopy``.

Source: QEMU ``qapi/migration.json`` (MigrationInfo, MigrationRAMInfo).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guestmem import TARGET_PAGE_BYTES, CollapseReport
from migration.engine.states import Status

from .destination.incoming import IncomingMigration
from .report import Report
from .source.outgoing import OutgoingMigration

_MBPS = 1_000_000


def describe(
    report: Report,
    outgoing: OutgoingMigration | None,
    incoming: IncomingMigration | None,
    parameters: Mapping[str, object],
    pressure: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """One reply. May be asked at any time, also while pages are missing."""
    info: dict[str, object] = {"status": report.status.value}
    if report.error is not None and report.status is not Status.COMPLETED:
        info["error-desc"] = report.error
    if outgoing is not None:
        info.update(_outgoing(report, outgoing, parameters))
    elif incoming is not None:
        info["x-postcopy"] = _incoming(report, incoming)
        if incoming.counts_blocktime and incoming.ram.native is not None:
            info.update(incoming.ram.blocktime())
    _add_host(info, report, pressure)
    return info


def _add_host(
    info: dict[str, object], report: Report, pressure: Mapping[str, object] | None
) -> None:
    """What the host says: warnings, and how long its tasks waited for memory meanwhile."""
    extra = info.get("x-postcopy")
    if not isinstance(extra, dict):
        return
    if pressure is not None:
        extra["memory-pressure"] = dict(pressure)
    if report.warnings:
        extra["warnings"] = list(report.warnings)


def _outgoing(
    report: Report, side: OutgoingMigration, parameters: Mapping[str, object]
) -> dict[str, object]:
    if side.ram.native is None:
        return {}
    stats = side.ram.statistics()
    total_ms = report.total_ms()
    sent = side.channels.bytes_sent
    remaining = 0 if report.status is Status.COMPLETED else side.ram.remaining_bytes
    downtime = report.downtime_ms()
    info: dict[str, object] = {
        "remaining": remaining,
        "total-time": total_ms,
        "setup-time": report.setup_ms(),
        "ram": {
            "transferred": sent,
            "remaining": remaining,
            "total": side.machine.ram.total_length,
            "duplicate": stats["pages_zero"],
            "normal": stats["pages_normal"],
            "normal-bytes": stats["pages_normal"] * TARGET_PAGE_BYTES,
            "dirty-pages-rate": side.dirty_pages_rate,
            "mbps": _mbps(report, side, sent),
            "dirty-sync-count": side.ram.sync_count,
            "postcopy-requests": stats["requests"],
            "page-size": TARGET_PAGE_BYTES,
            "multifd-bytes": sum(side.channels.multifd_bytes_sent),
            "pages-per-second": (stats["pages_zero"] + stats["pages_normal"])
            * 1000
            // max(1, total_ms),
            "precopy-bytes": side.precopy_bytes or sent,
            "downtime-bytes": side.downtime_bytes,
            "postcopy-bytes": max(0, sent - side.precopy_bytes - side.downtime_bytes)
            if side.precopy_bytes
            else 0,
            "dirty-sync-missed-zero-copy": 0,
        },
        "x-postcopy": {
            "features": [feature.name for feature in side.features],
            "recoveries": report.recoveries,
            "dirty-tracker": side.tracker_kind.value,
            "duplicate-requests": stats["duplicate_requests"],
            "requested-pages": stats["requested_pages"],
            "advised-pages": stats["advised_pages"],
            "served-directly": stats["served_direct"],
            "postcopy-pages": stats["postcopy_pages"],
            "switchover-ms": downtime,
            "handed-over-bytes": side.handed_over_bytes,
            "hole-pages": side.ram.hole_pages,
            "sync-ms": round(side.ram.sync_ns / 1e6, 3),
            **_per_channel(side.channels.multifd_bytes_sent),
        },
    }
    if percent := side.throttler.percent:
        info["cpu-throttle-percentage"] = percent
    if side.uses_xbzrle:
        info["xbzrle-cache"] = _xbzrle(stats, parameters)
    if report.status is Status.COMPLETED or report.guest_moved_ns is not None:
        info["downtime"] = round(downtime or 0)
    else:
        info["expected-downtime"] = _expected_downtime(side, remaining, parameters)
    return info


def _per_channel(figures: Sequence[int]) -> dict[str, object]:
    return {"multifd-channel-bytes": list(figures)} if figures else {}


def _mbps(report: Report, side: OutgoingMigration, sent: int) -> float:
    """Over the last window while pages go round, over the whole once that is over."""
    if report.status is Status.ACTIVE and side.bandwidth > 0:
        return side.bandwidth * 8 / _MBPS
    return sent * 8 * 1000 / max(1, report.total_ms()) / _MBPS


def _xbzrle(stats: Mapping[str, int], parameters: Mapping[str, object]) -> dict[str, object]:
    pages = stats["xbzrle_pages"]
    tried = pages + stats["xbzrle_misses"] + stats["xbzrle_overflows"]
    return {
        "cache-size": parameters["xbzrle-cache-size"],
        "bytes": stats["xbzrle_bytes"],
        "pages": pages,
        "cache-miss": stats["xbzrle_misses"],
        "cache-miss-rate": stats["xbzrle_misses"] / max(1, tried),
        "encoding-rate": pages * TARGET_PAGE_BYTES / max(1, stats["xbzrle_bytes"]),
        "overflow": stats["xbzrle_overflows"],
    }


def _expected_downtime(
    side: OutgoingMigration, remaining: int, parameters: Mapping[str, object]
) -> int:
    if side.bandwidth <= 0:
        return int(str(parameters["downtime-limit"]))
    return round(remaining / side.bandwidth * 1000)


def _incoming(report: Report, side: IncomingMigration) -> dict[str, object]:
    if side.ram.native is None:
        return {}
    stats = side.ram.statistics()
    last_word = {} if side.last_word_us is None else {"last-word-us": side.last_word_us}
    return {
        **last_word,
        "phase": side.phase.value,
        "recoveries": report.recoveries,
        "features": [feature.name for feature in side.features],
        "page-requests": stats["requests"],
        "faults": stats["faults"],
        "duplicate-faults": stats["duplicate_faults"],
        "resolved-locally": stats["resolved_locally"],
        "requests-during-device-load": stats["requests_by_main"],
        "pages-copied": stats["pages_normal"],
        "pages-zero": stats["pages_zero"],
        "precopy-pages": stats["precopy_pages"],
        "missing-pages": side.ram.missing_pages,
        "hole-pages": side.ram.hole_pages,
        "postcopy-latency": _average(stats["latency_ns_sum"], stats["latency_count"]),
        "postcopy-latency-dist": stats["latency_dist"],
        "bytes-received": side.channel.bytes_received,
        **_per_channel(side.multifd_bytes),
        **_collapse(side.collapse_report),
    }


def _collapse(report: CollapseReport | None) -> dict[str, object]:
    if report is None:
        return {}
    figures: dict[str, object] = {
        "state": report.state.value,
        "regions": report.region_count,
        "collapsed": report.collapsed,
        "busy": report.busy,
        "no-memory": report.no_memory,
        "refused": report.refused,
        "elapsed-ms": round(report.elapsed_ms, 1),
    }
    if report.reason:
        figures["last-error"] = report.reason
    return {"collapse": figures}


def _average(total: object, count: object) -> int:
    return int(str(total)) // int(str(count)) if count else 0
