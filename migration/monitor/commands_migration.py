"""QMP commands about migration: QEMU's names, arguments and answers."""

from __future__ import annotations

from .channels import uri_from_channels
from .dispatch import Argument, Call, Command
from .errors import QMPError


def _uri(call: Call) -> str:
    """The address of ``migrate`` and ``migrate-incoming``, given in one of two ways."""
    uri, channels = call.text("uri"), call.arguments.get("channels")
    if (uri is None) == (channels is None):
        raise QMPError("give either 'uri' or 'channels'")
    return uri if uri is not None else uri_from_channels(channels)


def _migrate(call: Call) -> object:
    call.monitor.service.migrate(_uri(call), resume=call.flag("resume"))
    return {}


def _migrate_incoming(call: Call) -> object:
    uri = _uri(call)
    call.monitor.exits_on_incoming_error = call.flag("exit-on-error", default=True)
    call.monitor.migrate_incoming(uri)
    return {}


def _migrate_cancel(call: Call) -> object:
    call.monitor.service.cancel()
    return {}


def _migrate_continue(call: Call) -> object:
    call.monitor.service.continue_(call.text("state") or "")
    return {}


def _start_postcopy(call: Call) -> object:
    call.monitor.service.start_postcopy()
    return {}


def _pause(call: Call) -> object:
    call.monitor.service.pause()
    return {}


def _recover(call: Call) -> object:
    call.monitor.service.recover(call.text("uri") or "")
    return {}


def _take_back(call: Call) -> object:
    is_known = call.flag("not-running-elsewhere")
    call.monitor.service.take_back(not_running_elsewhere=is_known)
    return {}


def _query_migrate(call: Call) -> object:
    return call.monitor.query_migrate()


def _query_capabilities(call: Call) -> object:
    offered = call.monitor.service.capabilities()
    return [{"capability": name, "state": state} for name, state in offered.items()]


def _set_capabilities(call: Call) -> object:
    changes: dict[str, bool] = {}
    entries = call.arguments["capabilities"]
    assert isinstance(entries, list)
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != {"capability", "state"}:
            raise QMPError(f"capabilities[{index}] must be an object of 'capability' and 'state'")
        name, state = entry["capability"], entry["state"]
        if not isinstance(name, str):
            raise QMPError(f"capabilities[{index}].capability must be of type string")
        if not isinstance(state, bool):
            raise QMPError(f"capabilities[{index}].state must be of type boolean")
        changes[name] = state
    call.monitor.set_capabilities(changes)
    return {}


def _query_parameters(call: Call) -> object:
    return call.monitor.service.parameters()


def _set_parameters(call: Call) -> object:
    call.monitor.service.set_parameters(call.arguments)
    return {}


_TIME_UNITS = {"second": 1000, "millisecond": 1}


def _unit(call: Call) -> str:
    unit = call.text("calc-time-unit") or "second"
    if unit not in _TIME_UNITS:
        raise QMPError(f"Parameter 'calc-time-unit' does not accept value '{unit}'")
    return unit


def _calc_dirty_rate(call: Call) -> object:
    mode = call.text("mode") or "page-sampling"
    if mode != "page-sampling":
        raise QMPError(f"mode '{mode}' is not offered by this runtime, only 'page-sampling'")
    time_, pages = call.arguments["calc-time"], call.arguments.get("sample-pages")
    assert isinstance(time_, int)
    assert pages is None or isinstance(pages, int)
    call.monitor.service.calc_dirty_rate(time_ * _TIME_UNITS[_unit(call)], pages)
    return {}


def _query_dirty_rate(call: Call) -> object:
    return call.monitor.service.query_dirty_rate(_unit(call))


def _query_yank(call: Call) -> object:
    return [{"type": "migration"}] if call.monitor.service.is_busy else []


def _yank(call: Call) -> object:
    instances = call.arguments["instances"]
    assert isinstance(instances, list)
    for instance in instances:
        if instance != {"type": "migration"}:
            raise QMPError(f"Instance {instance!r} not found: only {{'type': 'migration'}} is here")
        if not call.monitor.service.is_busy:
            raise QMPError("Instance of type 'migration' not found: there is no migration")
    for _ in instances:
        call.monitor.service.yank()
    return {}


_ADDRESS = (Argument("uri", str, is_optional=True), Argument("channels", list, is_optional=True))

MIGRATION_COMMANDS: tuple[Command, ...] = (
    Command(
        "migrate",
        _migrate,
        (
            *_ADDRESS,
            Argument("detach", bool, is_optional=True),  # accepted and without effect, as in QEMU
            Argument("resume", bool, is_optional=True),
        ),
    ),
    Command(
        "migrate-incoming",
        _migrate_incoming,
        (*_ADDRESS, Argument("exit-on-error", bool, is_optional=True)),
    ),
    Command("migrate_cancel", _migrate_cancel),
    Command("migrate-continue", _migrate_continue, (Argument("state", str),)),
    Command("migrate-start-postcopy", _start_postcopy),
    Command("migrate-pause", _pause, allows_oob=True),
    Command("migrate-recover", _recover, (Argument("uri", str),), allows_oob=True),
    Command("x-take-back", _take_back, (Argument("not-running-elsewhere", bool),)),
    Command("yank", _yank, (Argument("instances", list),), allows_oob=True),
    Command("query-yank", _query_yank, allows_oob=True),
    Command(
        "calc-dirty-rate",
        _calc_dirty_rate,
        (
            Argument("calc-time", int),
            Argument("calc-time-unit", str, is_optional=True),
            Argument("sample-pages", int, is_optional=True),
            Argument("mode", str, is_optional=True),
        ),
    ),
    Command(
        "query-dirty-rate",
        _query_dirty_rate,
        (Argument("calc-time-unit", str, is_optional=True),),
    ),
    Command("query-migrate", _query_migrate),
    Command("query-migrate-capabilities", _query_capabilities),
    Command("migrate-set-capabilities", _set_capabilities, (Argument("capabilities", list),)),
    Command("query-migrate-parameters", _query_parameters),
    Command("migrate-set-parameters", _set_parameters, takes_any=True),
)
