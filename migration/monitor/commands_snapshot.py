"""QMP commands about snapshots: QEMU's jobs, and a list of ours.

QEMU's arguments ``vmstate`` and ``devices`` name block nodes, which this VM has not (its disk is
part of the stream): they are refused like any argument that would have no effect.
"""

from __future__ import annotations

from collections.abc import Callable

from .context import Monitor, Snapshots
from .dispatch import Argument, Call, Command


def keeps_snapshots(monitor: Monitor) -> bool:
    """Whether the VM's service has snapshots at all."""
    return isinstance(monitor.service, Snapshots)


def _service(call: Call) -> Snapshots:
    service = call.monitor.service
    assert isinstance(service, Snapshots)  # is_offered has looked
    return service


def _job(act: Callable[[Snapshots, str], None]) -> Callable[[Call], object]:
    def run(call: Call) -> object:
        service, tag = _service(call), call.text("tag") or ""
        kind = act.__name__.strip("_").replace("_", "-")
        call.monitor.jobs.start(call.text("job-id") or "", kind, lambda: act(service, tag))
        return {}

    return run


def _snapshot_save(service: Snapshots, tag: str) -> None:
    service.savevm(tag)


def _snapshot_load(service: Snapshots, tag: str) -> None:
    service.loadvm(tag)


def _snapshot_delete(service: Snapshots, tag: str) -> None:
    service.delvm(tag)


def _dismiss(call: Call) -> object:
    call.monitor.jobs.dismiss(call.text("id") or "")
    return {}


_ARGUMENTS = (Argument("job-id", str), Argument("tag", str))

SNAPSHOT_COMMANDS: tuple[Command, ...] = (
    *(
        Command(name, _job(act), _ARGUMENTS, is_offered=keeps_snapshots)
        for name, act in (
            ("snapshot-save", _snapshot_save),
            ("snapshot-load", _snapshot_load),
            ("snapshot-delete", _snapshot_delete),
        )
    ),
    Command("query-jobs", lambda call: call.monitor.jobs.query(), is_offered=keeps_snapshots),
    Command("job-dismiss", _dismiss, (Argument("id", str),), is_offered=keeps_snapshots),
    Command(
        "x-query-snapshots",
        lambda call: _service(call).list_snapshots(),
        is_offered=keeps_snapshots,
    ),
)
