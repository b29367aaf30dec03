"""QEMU's commands about migration that make no sense here, so that a refusal can say why."""

from __future__ import annotations

from collections.abc import Mapping

_NO_RING = "it limits vCPUs by KVM's dirty ring from outside; auto-converge slows them here"
_NO_COLO = "COLO replication is not part of this runtime"

NOT_OFFERED: Mapping[str, str] = {
    "announce-self": "the guests here have no network card to announce",
    "client_migrate_info": "there is no display whose clients could follow",
    "query-vcpu-dirty-limit": _NO_RING,
    "set-vcpu-dirty-limit": _NO_RING,
    "cancel-vcpu-dirty-limit": _NO_RING,
    "query-migrationthreads": "QEMU has dropped it; 'ps -L' shows the threads by their names",
    "query-colo-status": _NO_COLO,
    "x-colo-lost-heartbeat": _NO_COLO,
    "xen-colo-do-checkpoint": _NO_COLO,
    "xen-set-replication": _NO_COLO,
    "query-xen-replication-status": _NO_COLO,
    "xen-save-devices-state": "there is no Xen here: 'snapshot-save' keeps a machine",
    "xen-load-devices-state": "there is no Xen here: 'snapshot-load' takes a machine back",
    "xen-set-global-dirty-log": "there is no Xen here",
    "query-qmp-schema": "'query-commands' lists what there is, docs/monitor.md describes it",
}
"""QMP name -> why it is not here."""
