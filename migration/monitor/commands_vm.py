"""QMP commands about the VM and the monitor itself."""

from __future__ import annotations

from .context import FeelsLatency, KnowsMemory, Sweepable
from .dispatch import Argument, Call, Command
from .errors import QMPError
from .hmp import HMP
from .version import version


def _query_status(call: Call) -> object:
    state = call.monitor.machine.run_state
    return {"status": state, "running": state == "running"}


def _query_name(call: Call) -> object:
    return {} if call.monitor.name is None else {"name": call.monitor.name}


def _query_uuid(call: Call) -> object:
    return {"UUID": str(call.monitor.uuid)}


def _stop(call: Call) -> object:
    call.monitor.service.stop_guest()
    return {}


def _cont(call: Call) -> object:
    call.monitor.service.cont()
    return {}


def _quit(call: Call) -> object:
    call.after_reply = lambda: call.monitor.on_quit("host-qmp-quit")
    return {}


def _getfd(call: Call) -> object:
    if call.received_fd is None:
        raise QMPError("no descriptor came with the command: send it as SCM_RIGHTS over unix:")
    call.monitor.fds.put(call.text("fdname") or "", call.received_fd)
    call.received_fd = None
    return {}


def _closefd(call: Call) -> object:
    store = call.monitor.fds
    store.dispose(store.take(call.text("fdname") or ""))
    return {}


def _human_monitor_command(call: Call) -> object:
    hmp = HMP(call.monitor)
    text = hmp.execute(call.text("command-line") or "", may_wait=False)
    call.after_reply = hmp.after_reply
    return text


def _query_machine(call: Call) -> object:
    machine = call.monitor.machine
    figures = machine.statistics()
    if isinstance(machine, FeelsLatency):
        figures["fault_latency_log2_us"] = machine.latency().octaves_us()
    return figures


def _oracle_sweep(call: Call) -> object:
    machine = call.monitor.machine
    if not isinstance(machine, Sweepable):
        raise QMPError("this machine has no oracle")
    if machine.run_state == "running":
        raise QMPError("the guest is running and writes while it would be checked: 'stop' it first")
    if call.monitor.service.query().get("status") == "postcopy-paused":
        raise QMPError("pages are missing and nobody brings them: recover the migration first")
    return machine.sweep().as_json()


def _query_memdev(call: Call) -> object:
    service = call.monitor.service
    assert isinstance(service, KnowsMemory)
    return service.query_memdev()


VM_COMMANDS: tuple[Command, ...] = (
    Command("query-version", lambda call: version()),
    Command("query-status", _query_status),
    Command("query-name", _query_name),
    Command("query-uuid", _query_uuid),
    Command("stop", _stop),
    Command("cont", _cont),
    Command("quit", _quit),
    Command("getfd", _getfd, (Argument("fdname", str),)),
    Command("closefd", _closefd, (Argument("fdname", str),)),
    Command(
        "human-monitor-command",
        _human_monitor_command,
        (Argument("command-line", str), Argument("cpu-index", int, is_optional=True)),
    ),
    Command(
        "query-memdev",
        _query_memdev,
        is_offered=lambda monitor: isinstance(monitor.service, KnowsMemory),
    ),
    Command("x-query-machine", _query_machine),
    Command(
        "x-oracle-sweep",
        _oracle_sweep,
        is_offered=lambda monitor: isinstance(monitor.machine, Sweepable),
    ),
)
