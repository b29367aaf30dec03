"""From one QMP request to one reply: who may say what when, argument checks, errors. No I/O.

A command is a row in a table (:class:`Command`): its arguments are declared, so that unknown,
missing and mistyped ones are refused in one place, the same way for every command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .context import Monitor
from .errors import COMMAND_NOT_FOUND, QMPError, as_qmp_error
from .json_stream import Malformed
from .not_offered import NOT_OFFERED

_JSON_NAMES: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    dict: "object",
    list: "array",
}


@dataclass(frozen=True)
class Argument:
    """One declared argument. ``type_`` is one of str, bool, int, dict, list."""

    name: str
    type_: type
    is_optional: bool = False


@dataclass
class Call:
    """One command being executed.

    :ivar arguments: checked against the declaration.
    :ivar received_fd: for ``getfd``: the descriptor that came with the request. Closed after the
        call unless the handler took it over (and set this to None).
    :ivar after_reply: set by a handler; run once the reply is queued (``quit`` answers before it
        acts).
    """

    monitor: Monitor
    arguments: dict[str, object]
    received_fd: int | None = None
    after_reply: Callable[[], None] | None = None

    def text(self, name: str) -> str | None:
        """A string argument, None when absent."""
        value = self.arguments.get(name)
        return value if isinstance(value, str) else None

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A boolean argument."""
        value = self.arguments.get(name, default)
        return value if isinstance(value, bool) else default


@dataclass(frozen=True)
class Command:
    """One QMP command.

    :ivar run: returns what goes under ``return``; raises :class:`QMPError` or a runtime error.
    :ivar allows_oob: may be executed out of band; then ``run`` must be quick.
    :ivar takes_any: further arguments are checked by ``run`` itself.
    :ivar is_offered: False hides the command (this VM cannot do it).
    """

    name: str
    run: Callable[[Call], object]
    arguments: tuple[Argument, ...] = ()
    allows_oob: bool = False
    takes_any: bool = False
    is_offered: Callable[[Monitor], bool] = lambda monitor: True


@dataclass
class Client:
    """What one connection has negotiated."""

    is_negotiated: bool = False
    has_oob: bool = False


@dataclass
class Request:
    """One request after the first look; ``error`` set when it is already refused.

    :ivar reply_id: ``{"id": ...}`` to send back, or empty.
    """

    name: str = ""
    arguments: dict[str, object] = field(default_factory=dict)
    is_oob: bool = False
    reply_id: dict[str, object] = field(default_factory=dict)
    received_fd: int | None = None
    error: QMPError | None = None


@dataclass(frozen=True)
class Answer:
    """The reply to send, and what to do once it is queued."""

    reply: dict[str, object]
    after_reply: Callable[[], None] | None = None


def read_request(message: object, client: Client) -> Request:
    """Take a message apart; every reason to refuse its *form* ends up in ``Request.error``."""
    request = Request()
    try:
        _read_request(message, client, request)
    except QMPError as error:
        request.error = error
    return request


def _read_request(message: object, client: Client, request: Request) -> None:
    if isinstance(message, Malformed):
        raise QMPError(message.reason)
    if not isinstance(message, dict):
        raise QMPError("a QMP request is a JSON object")
    if "id" in message:
        request.reply_id = {"id": message["id"]}
    verbs = ("execute", "exec-oob") if client.has_oob else ("execute",)
    for member in message:
        if member not in (*verbs, "arguments", "id"):
            raise QMPError(f"unexpected member {member!r} in the request")
    named = [verb for verb in verbs if verb in message]
    if len(named) != 1:
        raise QMPError("a request has exactly one of " + " and ".join(map(repr, verbs)))
    request.is_oob = named[0] == "exec-oob"
    name, arguments = message[named[0]], message.get("arguments", {})
    if not isinstance(name, str):
        raise QMPError(f"{named[0]!r} must be a string")
    if not isinstance(arguments, dict):
        raise QMPError("'arguments' must be an object")
    request.name, request.arguments = name, arguments


class Dispatcher:
    """The table of commands of one VM, shared by all its clients. Threads: any, also at once."""

    def __init__(self, monitor: Monitor, commands: Iterable[Command]) -> None:
        self._monitor = monitor
        self._commands = {command.name: command for command in commands}
        self._commands["query-commands"] = Command(
            "query-commands", lambda call: [{"name": name} for name in self.names()]
        )

    def names(self) -> list[str]:
        """The commands this VM offers."""
        offered = (name for name, row in self._commands.items() if row.is_offered(self._monitor))
        return ["qmp_capabilities", *offered]

    def discard(self, request: Request) -> None:
        """Give up a request that will not be executed, with the descriptor that came with it."""
        self._monitor.fds.dispose(request.received_fd)

    def runs_out_of_band(self, request: Request) -> bool:
        """Whether the request asks for out-of-band execution and may have it."""
        command = self._commands.get(request.name)
        return request.is_oob and request.error is None and bool(command and command.allows_oob)

    def execute(self, request: Request, client: Client) -> Answer:
        """Run one request to its reply. May wait as long as the command does; never raises."""
        if request.error is not None:
            return Answer(request.reply_id | request.error.reply())
        call = Call(self._monitor, request.arguments, request.received_fd)
        try:
            result = self._execute(request, client, call)
        except Exception as error:  # the client gets every failure as a reply
            reply = as_qmp_error(error, doing=request.name).reply()
            return Answer(request.reply_id | reply)
        finally:
            self._monitor.fds.dispose(call.received_fd)
        return Answer({"return": result} | request.reply_id, call.after_reply)

    def _execute(self, request: Request, client: Client, call: Call) -> object:
        if request.name == "qmp_capabilities" and not request.is_oob:
            return _negotiate(request.arguments, client)
        if not client.is_negotiated:
            raise QMPError(
                "capabilities negotiation comes first: send 'qmp_capabilities'",
                qmp_class=COMMAND_NOT_FOUND,
            )
        command = self._commands.get(request.name)
        if command is None or not command.is_offered(self._monitor):
            raise QMPError(_why_not(request.name), qmp_class=COMMAND_NOT_FOUND)
        if request.is_oob and not command.allows_oob:
            raise QMPError(f"{request.name!r} cannot be executed out of band")
        _check_arguments(command, request.arguments)
        return command.run(call)


def _why_not(name: str) -> str:
    reason = NOT_OFFERED.get(name)
    if reason is None:
        return f"there is no command {name!r}"
    return f"The command {name} is not offered by this runtime: {reason}"


def _negotiate(arguments: Mapping[str, object], client: Client) -> object:
    if client.is_negotiated:
        raise QMPError("capabilities are negotiated already", qmp_class=COMMAND_NOT_FOUND)
    for name in arguments:
        if name != "enable":
            raise QMPError(f"unexpected argument {name!r}")
    wanted = arguments.get("enable", [])
    if not isinstance(wanted, list) or any(name != "oob" for name in wanted):
        raise QMPError("'enable' takes a list of offered capabilities: \"oob\"")
    client.is_negotiated = True
    client.has_oob = "oob" in wanted
    return {}


def _check_arguments(command: Command, given: Mapping[str, object]) -> None:
    declared = {argument.name: argument for argument in command.arguments}
    for name, value in given.items():
        argument = declared.get(name)
        if argument is None:
            if command.takes_any:
                continue
            raise QMPError(f"unexpected argument {name!r}")
        # bool is an int to Python, not to JSON
        is_wrong_int = argument.type_ is int and isinstance(value, bool)
        if not isinstance(value, argument.type_) or is_wrong_int:
            raise QMPError(f"argument {name!r} must be of type {_JSON_NAMES[argument.type_]}")
    for argument in command.arguments:
        if not argument.is_optional and argument.name not in given:
            raise QMPError(f"argument {argument.name!r} is missing")
