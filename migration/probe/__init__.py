"""What this kernel, this host and this user can do for postcopy, found out by doing it.

    from migration.probe import probe

    report = probe("hugetlb")
    print(report.is_ready, [row.name for row in report.missing])

Nothing here compares version numbers. Each row is a check in a process of its own: it opens,
registers, faults, places, and looks at the result. A check that crashes or hangs loses its own row.
Nothing on the host is changed. The checks themselves (:mod:`migration.probe.catalogue`) are
imported in the child only, so that this works even where the lower rooms do not.
"""

from .facts import Host, describe_host
from .purposes import DEFAULT, PURPOSES, Purpose
from .report import Report, probe
from .row import Cause, Check, Outcome, Row, Status, Tier
from .session import CATALOGUE, Findings, Limits, ProbeError, UnknownRow, run_checks

__all__ = [
    "CATALOGUE",
    "DEFAULT",
    "PURPOSES",
    "Cause",
    "Check",
    "Findings",
    "Host",
    "Limits",
    "Outcome",
    "ProbeError",
    "Purpose",
    "Report",
    "Row",
    "Status",
    "Tier",
    "UnknownRow",
    "describe_host",
    "probe",
    "run_checks",
]
