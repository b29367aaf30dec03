"""Runs inside the VMs: the toy VM migrates, within one kernel and from one kernel to another.

Whether this kernel can is asked of the probe's rows, so that a skip names what is missing. The
commands are the project's own, in processes of their own; two VMs agree on what comes next by
having the same list.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qemu.qmp import QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

#: What a source must be able to do, by kind of RAM; the probe's row says so.
NEEDS = {"anon": "dirty-anon", "memfd": "dirty-shmem", "hugetlb": "dirty-hugetlb-2M"}
_SIZE = {"anon": "64M", "memfd": "64M", "hugetlb": "8M"}
_COMMAND = (sys.executable, "-m", "migration")
_LIMIT_S, _LAG_S = 300.0, 900.0
_STREAM_PORT, _MONITOR_PORT = 4444, 4445
_TAIL = 2000

Record = dict[str, object]


def why_not(backing: str, rows: Mapping[str, Mapping[str, object]]) -> str | None:
    """Why a guest on this kind of RAM cannot leave this kernel; None: it can."""
    row = rows.get(NEEDS[backing], {})
    if row.get("status") == "yes":
        return None
    why = row.get("detail") or row.get("reason") or "the probe does not say"
    return f"{NEEDS[backing]}: {why}"


def demo(backing: str, rows: Mapping[str, Mapping[str, object]]) -> Record:
    """``postcopy demo`` on one kind of RAM: both ends on this kernel."""
    record: Record = {"step": "demo", "backing": backing}
    if reason := why_not(backing, rows):
        return {**record, "status": "skip", "reason": reason}
    line = [*_COMMAND, "demo", "--backing", backing, "-m", _SIZE[backing], "--json"]
    result = _judged(line)
    figures = result["figures"]
    assert isinstance(figures, dict)
    of_interest = {"requests": figures.get("page_requests"), "oracle": figures.get("oracle")}
    return {**record, **result, **of_interest}


def _judged(line: Sequence[str]) -> Record:
    """Run a command whose last line is a JSON object with a ``result``."""
    began = time.monotonic()
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        words = (error.stderr or b"").decode(errors="replace")[-_TAIL:]
        why = f"not done within {_LIMIT_S:g} s: {words}"
        return {"status": "fail", "reason": why, "figures": {}}
    figures = _last_object(done.stdout)
    is_ok = done.returncode == 0 and figures.get("result") == "ok"
    record: Record = {"status": "ok" if is_ok else "fail", "figures": figures}
    if not is_ok:
        record["reason"] = f"exit status {done.returncode}: {done.stderr[-_TAIL:]}"
    return {**record, "seconds": round(time.monotonic() - began, 1)}


def _last_object(text: str) -> Record:
    lines = text.strip().splitlines()
    with suppress(ValueError):
        found = json.loads(lines[-1]) if lines else {}
        return found if isinstance(found, dict) else {}
    return {}


def crossings(
    plan: Mapping[str, object], rows: Mapping[str, Mapping[str, object]]
) -> Iterator[Record]:
    """This VM's part of each migration between the two: one record where it is the source.

    :param plan: ``me``, ``address``, ``peer`` (an address), ``moves`` (backing, source,
        destination), the same list in both VMs.
    """
    me, address, peer = plan["me"], str(plan["address"]), str(plan["peer"])
    moves = plan["moves"]
    assert isinstance(moves, list)
    for move in moves:
        if move["source"] == me:
            yield {"step": "crossing", **move, **_leave(move["backing"], peer, rows)}
        else:
            _take_in(move["backing"], address)


def _take_in(backing: str, address: str) -> None:
    """Be the destination until the source says ``quit``."""
    monitor = f"tcp:{address}:{_MONITOR_PORT},allow-remote=on"
    with _toy(backing, "--incoming", "defer", "--qmp", monitor) as vm:
        vm.wait(timeout=2 * _LIMIT_S)


def _leave(backing: str, peer: str, rows: Mapping[str, Mapping[str, object]]) -> Record:
    """Be the source: migrate, have all memory checked at the destination, end both."""
    monitor = _connect((peer, _MONITOR_PORT))
    try:
        reason = why_not(backing, rows)
        if reason:
            return {"status": "skip", "reason": reason}
        own = Path("/tmp/source.qmp")
        own.unlink(missing_ok=True)
        with _toy(backing, "--qmp", f"unix:{own}"):
            source = _connect(str(own))
            line = [*_COMMAND, "migrate", str(own), f"tcp:{peer}:{_STREAM_PORT}", "--json"]
            line += ["--destination", f"{peer}:{_MONITOR_PORT}", "--postcopy-after", "1"]
            line += ["--listen", f"tcp:{peer}:{_STREAM_PORT},allow-remote=on"]
            record = _judged(line)
            if record["status"] == "ok":
                record = {**record, **_checked(monitor, source)}
            source.cmd("quit")
        return record
    finally:
        with suppress(QMPError, OSError):
            monitor.cmd("quit")


def _checked(destination: QEMUMonitorProtocol, source: QEMUMonitorProtocol) -> Record:
    """The oracle's sweep over all of RAM, where the guest now is."""
    state = _ask(destination, "query-status")["status"]
    destination.cmd("stop")
    oracle = _ask(destination, "x-oracle-sweep")
    is_ok = state == "running" and oracle["errors"] == 0 and oracle["pages_checked"] > 0
    requests = _ask(source, "query-migrate")["ram"]["postcopy-requests"]
    record: Record = {"oracle": oracle, "requests": requests}
    if not is_ok:
        record |= {"status": "fail", "reason": f"the guest is {state}, the oracle says {oracle}"}
    return record


def _ask(vm: QEMUMonitorProtocol, command: str) -> dict[str, Any]:
    """A command that answers with an object."""
    answer = vm.cmd(command)
    assert isinstance(answer, dict)
    return answer


@contextmanager
def _toy(backing: str, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
    """A toy VM that ends with the block."""
    line = [*_COMMAND, "run", "--backing", backing, "-m", _SIZE[backing], *arguments]
    vm = subprocess.Popen([*line, "--run-with", "exit-with-parent=on"], stdin=subprocess.DEVNULL)
    try:
        yield vm
    finally:
        with suppress(subprocess.TimeoutExpired):
            vm.wait(timeout=5)
        vm.kill()
        vm.wait()


def _connect(address: str | tuple[str, int]) -> QEMUMonitorProtocol:
    """A monitor, as soon as somebody listens there; the other VM may still be starting, or lag
    behind as far as two VMs of one list can.
    """
    deadline = time.monotonic() + _LAG_S
    tries = 0
    while True:
        tries += 1
        monitor = QEMUMonitorProtocol(address)
        monitor.settimeout(_LIMIT_S)
        try:
            monitor.connect()
        except (QMPError, OSError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody answers at {address}: {error}") from None
            if tries % 60 == 0:
                print(f"# waiting for {address}", flush=True)  # that is no hang
            time.sleep(0.5)  # nothing tells when a machine elsewhere begins to listen
        else:
            return monitor
