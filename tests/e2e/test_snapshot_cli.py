"""Snapshots as a user meets them: HMP, QMP jobs, ``run --loadvm``, and a process that is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from migration.runtime.snapshots.files import names_in
from migration.runtime.snapshots.manifest import read, verify
from tests.support.monitor_process import RunningVM, run_postcopy
from tests.support.qmp import Message, QmpClient, QmpError
from tests.support.snapshot_vm import whole_names

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

_SMALL = ("-m", "16M", "--disk", "1M")


def _hmp(client: QmpClient, line: str) -> str:
    text = client.execute("human-monitor-command", {"command-line": line})
    assert isinstance(text, str)
    return text


def _concluded(client: QmpClient, job: str) -> Message:
    """Wait for a job's end, and forget it."""
    client.wait_event("JOB_STATUS_CHANGE", lambda d: d == {"id": job, "status": "concluded"})
    (info,) = [info for info in client.execute("query-jobs") if info["id"] == job]
    client.execute("job-dismiss", {"id": job})
    client.wait_event("JOB_STATUS_CHANGE", lambda d: d == {"id": job, "status": "null"})
    assert isinstance(info, dict)
    return info


def _sweep_is_clean(client: QmpClient) -> None:
    client.execute("stop")
    assert client.execute("x-oracle-sweep")["errors"] == 0


def test_a_vm_is_saved_by_hmp_and_started_again_from_there(tmp_path: Path) -> None:
    """As in QEMU: savevm, info snapshots, quit, -loadvm."""
    store = tmp_path / "store"
    store.mkdir()
    options = (*_SMALL, "--snapshot-dir", str(store))
    with RunningVM(tmp_path, "first", *options) as vm, vm.client() as client:
        assert "no snapshot available" in _hmp(client, "info snapshots")
        assert _hmp(client, "savevm one").strip() == ""
        client.wait_event("STOP")
        client.wait_event("RESUME")
        table = _hmp(client, "info snapshots")
        assert "VM CLOCK" in table
        assert "one" in table
        assert "toy-1.1, stream, running" in table
        assert "no snapshot name" in _hmp(client, "savevm ../two")
        assert "is missing" in _hmp(client, "savevm")
        assert _hmp(client, "loadvm one").strip() == ""
        _sweep_is_clean(client)
        ops = client.execute("x-query-machine")["ops"]
        client.execute("quit")
        assert vm.wait_exit() == 0
    assert ops > 0
    with (
        RunningVM(tmp_path, "second", *options, "-loadvm", "one", "-S") as vm,
        vm.client() as client,
    ):
        assert client.execute("query-status") == {"status": "paused", "running": False}
        assert client.execute("x-query-machine")["ops"] > 0
        client.execute("cont")
        _sweep_is_clean(client)
        assert _hmp(client, "delvm one").strip() == ""
        assert "no snapshot 'one'" in _hmp(client, "delvm one")
    assert list(store.iterdir()) == []


def test_snapshots_are_jobs_in_qmp(tmp_path: Path) -> None:
    """Save, load, list, delete; an error is the job's, and it waits until it is dismissed."""
    store = tmp_path / "store"
    store.mkdir()
    options = (*_SMALL, "--snapshot-dir", str(store))
    with RunningVM(tmp_path, "vm", *options) as vm, vm.client() as client:
        assert client.execute("snapshot-save", {"job-id": "s1", "tag": "a"}) == {}
        done = _concluded(client, "s1")
        assert done == {
            "id": "s1",
            "type": "snapshot-save",
            "status": "concluded",
            "current-progress": 1,
            "total-progress": 1,
        }
        (info,) = client.execute("x-query-snapshots")
        assert (info["name"], info["layout"], info["run-state"]) == ("a", "stream", "running")
        client.execute("snapshot-load", {"job-id": "l1", "tag": "a"})
        assert "error" not in _concluded(client, "l1")
        assert client.execute("query-status")["running"] is True
        client.execute("snapshot-load", {"job-id": "l2", "tag": "b"})
        assert "no snapshot 'b'" in _concluded(client, "l2")["error"]
        with pytest.raises(QmpError, match="unexpected argument 'vmstate'"):
            client.execute("snapshot-save", {"job-id": "x", "tag": "a", "vmstate": "disk0"})
        with pytest.raises(QmpError, match="Job not found"):
            client.execute("job-dismiss", {"id": "x"})
        client.execute("snapshot-delete", {"job-id": "d1", "tag": "a"})
        assert "error" not in _concluded(client, "d1")
        assert client.execute("x-query-snapshots") == []
        assert client.execute("query-jobs") == []
        _sweep_is_clean(client)


def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    """No such snapshot, no directory, two origins, another shape; status 1 or 2, no traceback."""
    store = tmp_path / "store"
    store.mkdir()
    options = ("--snapshot-dir", str(store))
    with RunningVM(tmp_path, "vm", *_SMALL, *options) as vm, vm.client() as client:
        _hmp(client, "savevm one")
    for arguments, why in (
        ((*_SMALL, *options, "--loadvm", "two"), "there is no snapshot 'two'"),
        (("-m", "32M", *options, "--loadvm", "one"), "has RAM toy.ram 16384 KiB"),
        ((*_SMALL, "--loadvm", "one"), "--snapshot-dir"),
        ((*_SMALL, "--snapshot-dir", str(store / "no")), "is no directory"),
        ((*_SMALL, "--loadvm", "one", "--incoming", "defer"), "give one"),
    ):
        done = run_postcopy("run", *arguments)
        assert done.returncode in (1, 2), arguments
        assert why in done.stderr
        assert "Traceback" not in done.stderr
    assert whole_names(store) == ["one"]


@pytest.mark.parametrize("capability", ["mapped-ram", None])
@pytest.mark.parametrize(("tag", "moment"), [("new", "STOP"), ("old", "STOP"), ("old", "RESUME")])
def test_a_killed_process_leaves_no_half_snapshot(
    tmp_path: Path, tag: str, moment: str, capability: str | None
) -> None:
    """While it is written (the guest stands) and while it is synced (the guest runs again): what is
    there afterwards is whole, the old one at least."""
    store = tmp_path / "store"
    store.mkdir()
    options = ("-m", "256M", "--snapshot-dir", str(store))
    with RunningVM(tmp_path, "vm", *options) as vm, vm.client() as client:
        if capability is not None:
            states = [{"capability": capability, "state": True}]
            client.execute("migrate-set-capabilities", {"capabilities": states})
        _hmp(client, "savevm old")
        with vm.client() as witness:  # sees only what comes from here on
            client.execute("snapshot-save", {"job-id": "s", "tag": tag})
            witness.wait_event(moment)
            vm.signal(signal.SIGKILL)
            vm.process.wait()
    names = whole_names(store)
    assert "old" in names
    for name in names:
        manifest = read(store / f"{name}.vmstate.json")
        if manifest is None:
            continue  # killed between the two names: whole, but only loading it can tell
        fd = os.open(store / f"{name}.vmstate", os.O_RDONLY)
        try:
            verify(manifest, fd, offset=0, label=name)
        finally:
            os.close(fd)
    with (
        RunningVM(tmp_path, "again", *options, "--loadvm", "old") as vm,
        vm.client() as client,
    ):
        _sweep_is_clean(client)
        _hmp(client, "savevm new")
    assert names_in(store) == whole_names(store) == ["new", "old"]
