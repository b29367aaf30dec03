"""The table of HMP commands. Names, options and units are QEMU's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .context import KnowsMemory, Monitor, Snapshots
from .errors import QMPError
from .hmp_info import (
    capabilities_text,
    dirty_rate_text,
    memdev_text,
    migration_text,
    name_text,
    parameters_text,
    snapshots_text,
    status_text,
    version_text,
)
from .units import parse_size, parse_switch

_MIB_BY_DEFAULT = frozenset({"max-bandwidth", "avail-switchover-bandwidth"})
"""Parameters whose plain number counts MiB, as in QEMU; every other size counts bytes."""


class UsageError(Exception):
    """The words after a command do not fit it."""

    def __init__(self, command: str, problem: str) -> None:
        super().__init__(f"{command}: {problem}")
        self.command = command


@dataclass
class HMPCall:
    """One line being executed.

    :ivar words: what follows the command's name; handlers take them off from the left.
    """

    monitor: Monitor
    name: str
    words: list[str]
    may_wait: bool = False
    after_reply: Callable[[], None] | None = None

    def flags(self, allowed: str) -> set[str]:
        """Take leading options like ``-d`` off; UsageError for one that is not allowed."""
        found: set[str] = set()
        while self.words and self.words[0].startswith("-") and len(self.words[0]) > 1:
            letters = set(self.words.pop(0)[1:])
            if letters - set(allowed):
                raise UsageError(self.name, f"unknown option -{''.join(sorted(letters))}")
            found |= letters
        return found

    def take(self, what: str) -> str:
        """Take one word off; UsageError when there is none."""
        if not self.words:
            raise UsageError(self.name, f"{what} is missing")
        return self.words.pop(0)

    def end(self) -> None:
        """UsageError when words are left over."""
        if self.words:
            raise UsageError(self.name, f"unexpected {self.words[0]!r}")


@dataclass(frozen=True)
class HMPCommand:
    """One HMP command. ``run`` returns the text to show, lines separated by LF."""

    name: str
    usage: str
    help: str
    run: Callable[[HMPCall], str]
    aliases: tuple[str, ...] = ()
    is_offered: Callable[[Monitor], bool] = lambda monitor: True


def _simple(act: Callable[[Monitor], object]) -> Callable[[HMPCall], str]:
    """A command without arguments and without an answer."""

    def run(call: HMPCall) -> str:
        call.end()
        act(call.monitor)
        return ""

    return run


def _shown(show: Callable[[Monitor], str]) -> Callable[[HMPCall], str]:
    """An ``info`` command."""

    def run(call: HMPCall) -> str:
        call.end()
        return show(call.monitor)

    return run


def _with_uri(act: Callable[[Monitor, str], object]) -> Callable[[HMPCall], str]:
    """A command whose one argument is an address."""

    def run(call: HMPCall) -> str:
        uri = call.take("the URI")
        call.end()
        act(call.monitor, uri)
        return ""

    return run


def _migrate(call: HMPCall) -> str:
    flags = call.flags("dr")
    uri = call.take("the URI")
    call.end()
    service = call.monitor.service
    service.migrate(uri, resume="r" in flags)
    if "d" in flags:
        return ""
    if not call.may_wait:
        return "this console cannot wait for the end; the migration goes on detached (as with -d)"
    status = service.wait(None)
    description = service.query().get("error-desc")
    return f"Migration {status}" + (f": {description}" if description else "")


def _take_back(call: HMPCall) -> str:
    flags = call.flags("n")
    call.end()
    call.monitor.service.take_back(not_running_elsewhere="n" in flags)
    return ""


def _calc_dirty_rate(call: HMPCall) -> str:
    numbers = [_number(call, "the time in seconds")]
    if call.words:
        numbers.append(_number(call, "the number of pages"))
    call.end()
    call.monitor.service.calc_dirty_rate(numbers[0] * 1000, *numbers[1:])
    return "Starting dirty rate measurement; 'info dirty_rate' shows what came out"


def _number(call: HMPCall, what: str) -> int:
    word = call.take(what)
    if not word.isdecimal():
        raise UsageError(call.name, f"{word!r} is no number")
    return int(word)


def _migrate_incoming(call: HMPCall) -> str:
    uri = call.take("the URI")
    call.end()
    call.monitor.migrate_incoming(uri)
    return ""


def _set_capability(call: HMPCall) -> str:
    name, state = call.take("the capability's name"), call.take("'on' or 'off'")
    call.end()
    try:
        switch = parse_switch(state)
    except ValueError as error:
        raise UsageError(call.name, str(error)) from None
    call.monitor.set_capabilities({name: switch})
    return ""


def parameter_value(name: str, text: str, current: object) -> object:
    """What ``migrate_set_parameter NAME TEXT`` means, typed like the parameter's ``current`` value.

    :raises ValueError: ``text`` is not of that type.
    """
    if isinstance(current, bool):
        return parse_switch(text)
    if isinstance(current, int):
        if name in _MIB_BY_DEFAULT:
            return parse_size(text, default_unit="M")
        return parse_size(text)
    return text


def _set_parameter(call: HMPCall) -> str:
    name, text = call.take("the parameter's name"), call.take("the value")
    call.end()
    known = call.monitor.service.parameters()
    if name not in known:
        raise QMPError(f"there is no parameter {name!r}: see 'info migrate_parameters'")
    try:
        value = parameter_value(name, text, known[name])
    except ValueError as error:
        raise QMPError(f"{name}: {error}") from None
    call.monitor.service.set_parameters({name: value})
    return ""


def _set_speed(call: HMPCall) -> str:
    """Gone from QEMU since 6.0; sets ``max-bandwidth``, which postcopy ignores."""
    text = call.take("the speed in bytes per second (plain numbers are MiB)")
    call.end()
    try:
        speed = parse_size(text, default_unit="M")
    except ValueError as error:
        raise UsageError(call.name, str(error)) from None
    service = call.monitor.service
    service.set_parameters({"max-bandwidth": speed})
    if str(service.query().get("status", "")).startswith("postcopy"):
        return (
            "noted, but without effect now: in postcopy only max-postcopy-bandwidth limits, and "
            "only what nobody asked for"
        )
    return ""


def _quit(call: HMPCall) -> str:
    call.end()
    call.after_reply = lambda: call.monitor.on_quit("host-qmp-quit")
    return ""


def _continue(call: HMPCall) -> str:
    state = call.take("the migration status to leave")
    call.end()
    call.monitor.service.continue_(state)
    return ""


def _snapshot(act: Callable[[Snapshots, str], None]) -> Callable[[HMPCall], str]:
    def run(call: HMPCall) -> str:
        name = call.take("the snapshot's name")
        call.end()
        service = call.monitor.service
        assert isinstance(service, Snapshots)  # is_offered has looked
        act(service, name)
        return ""

    return run


def _info_snapshots(monitor: Monitor) -> str:
    assert isinstance(monitor.service, Snapshots)
    return snapshots_text(monitor.service.list_snapshots())


def _info_memdev(monitor: Monitor) -> str:
    assert isinstance(monitor.service, KnowsMemory)
    return memdev_text(monitor.service.query_memdev())


def _keeps_snapshots(monitor: Monitor) -> bool:
    return isinstance(monitor.service, Snapshots)


HMP_COMMANDS: tuple[HMPCommand, ...] = (
    HMPCommand(
        "migrate",
        "migrate [-d] [-r] uri",
        "migrate to URI (-d: do not wait for the end; -r: resume a paused postcopy)",
        _migrate,
    ),
    HMPCommand(
        "migrate_cancel",
        "migrate_cancel",
        "cancel the running migration; the guest goes on here",
        _simple(lambda monitor: monitor.service.cancel()),
    ),
    HMPCommand(
        "migrate_continue",
        "migrate_continue state",
        "let a migration that waits in STATE go on (e.g. pre-switchover)",
        _continue,
    ),
    HMPCommand(
        "migrate_incoming",
        "migrate_incoming uri",
        "listen on URI for the migration a VM started with '--incoming defer' waits for",
        _migrate_incoming,
    ),
    HMPCommand(
        "migrate_pause",
        "migrate_pause",
        "break the channel of a running postcopy, so that it can be recovered over another",
        _simple(lambda monitor: monitor.service.pause()),
    ),
    HMPCommand(
        "calc_dirty_rate",
        "calc_dirty_rate second [sample_pages_per_GB]",
        "measure how fast the guest dirties memory; 'info dirty_rate' shows it",
        _calc_dirty_rate,
    ),
    HMPCommand(
        "migrate_recover",
        "migrate_recover uri",
        "listen on URI for the source of a paused postcopy",
        _with_uri(lambda monitor, uri: monitor.service.recover(uri)),
    ),
    HMPCommand(
        "migrate_set_capability",
        "migrate_set_capability capability on|off",
        "switch a migration capability",
        _set_capability,
    ),
    HMPCommand(
        "migrate_set_parameter",
        "migrate_set_parameter parameter value",
        "set a migration parameter (max-bandwidth: plain numbers are MiB; suffixes B K M G T)",
        _set_parameter,
    ),
    HMPCommand(
        "migrate_set_speed",
        "migrate_set_speed value",
        "limit precopy to VALUE bytes a second (plain numbers are MiB); ignored in postcopy",
        _set_speed,
    ),
    HMPCommand(
        "migrate_start_postcopy",
        "migrate_start_postcopy",
        "switch the running migration to postcopy (needs the capability postcopy-ram)",
        _simple(lambda monitor: monitor.service.start_postcopy()),
    ),
    HMPCommand(
        "x_take_back",
        "x_take_back [-n]",
        "run the guest of a precopy here again whose last word was lost (-n: you know that it does "
        "not run at the destination)",
        _take_back,
    ),
    HMPCommand(
        "stop", "stop", "stop the guest", _simple(lambda m: m.service.stop_guest()), aliases=("s",)
    ),
    HMPCommand(
        "cont", "cont|c", "let the guest run", _simple(lambda m: m.service.cont()), aliases=("c",)
    ),
    HMPCommand("quit", "quit|q", "end this VM and its process", _quit, aliases=("q",)),
    HMPCommand(
        "savevm",
        "savevm tag",
        "save the whole machine as snapshot TAG, or into file:PATH[,offset=N]",
        _snapshot(lambda service, name: service.savevm(name)),
        is_offered=_keeps_snapshots,
    ),
    HMPCommand(
        "loadvm",
        "loadvm tag",
        "go back to snapshot TAG, or to what file:PATH[,offset=N] holds",
        _snapshot(lambda service, name: service.loadvm(name)),
        is_offered=_keeps_snapshots,
    ),
    HMPCommand(
        "delvm",
        "delvm tag",
        "delete snapshot TAG",
        _snapshot(lambda service, name: service.delvm(name)),
        is_offered=_keeps_snapshots,
    ),
)

INFO_COMMANDS: tuple[HMPCommand, ...] = (
    HMPCommand(
        "info migrate",
        "info migrate [-a]",
        "the state of the migration (-a: everything that is known)",
        lambda call: _info_migrate(call),
    ),
    HMPCommand(
        "info migrate_capabilities",
        "info migrate_capabilities",
        "the migration capabilities",
        _shown(lambda monitor: capabilities_text(monitor.service.capabilities())),
    ),
    HMPCommand(
        "info migrate_parameters",
        "info migrate_parameters",
        "the migration parameters",
        _shown(lambda monitor: parameters_text(monitor.service.parameters())),
    ),
    HMPCommand(
        "info memdev",
        "info memdev",
        "what guest RAM is made of, and on which NUMA nodes it lies",
        _shown(_info_memdev),
        is_offered=lambda monitor: isinstance(monitor.service, KnowsMemory),
    ),
    HMPCommand(
        "info dirty_rate",
        "info dirty_rate",
        "how fast the guest dirties memory, as 'calc_dirty_rate' measured it",
        _shown(lambda monitor: dirty_rate_text(monitor.service.query_dirty_rate())),
    ),
    HMPCommand("info name", "info name", "the VM's name", _shown(lambda m: name_text(m.name))),
    HMPCommand("info uuid", "info uuid", "the VM's UUID", _shown(lambda m: str(m.uuid))),
    HMPCommand(
        "info status",
        "info status",
        "whether the guest runs",
        _shown(lambda monitor: status_text(monitor.machine.run_state)),
    ),
    HMPCommand(
        "info snapshots",
        "info snapshots",
        "the snapshots in the snapshot directory",
        _shown(_info_snapshots),
        is_offered=_keeps_snapshots,
    ),
    HMPCommand("info version", "info version", "who this is", _shown(lambda m: version_text())),
)


def _info_migrate(call: HMPCall) -> str:
    flags = call.flags("a")
    call.end()
    return migration_text(call.monitor.query_migrate(), everything="a" in flags)
