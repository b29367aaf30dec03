"""HMP: the monitor for people. One line in, text out; the commands are QEMU's.

The same code answers on a terminal, on a unix socket and inside QMP's ``human-monitor-command``.
Lines end in CR LF, as ``qmp-shell -H`` expects. Sans-I/O; ``migrate`` without ``-d`` waits for the
migration's end where the caller allows it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from .context import Monitor
from .errors import QMPError, as_qmp_error
from .hmp_commands import HMP_COMMANDS, INFO_COMMANDS, HMPCall, HMPCommand, UsageError


class HMP:
    """One console. Threads: one at a time.

    :ivar after_reply: to be run once the text of the last command was sent; None mostly.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self.after_reply: Callable[[], None] | None = None

    def execute(self, line: str, *, may_wait: bool) -> str:
        """Run one line; return what to show: lines ended by CR LF, or nothing. Never raises.

        :param may_wait: this console may block until a migration has ended.
        """
        self.after_reply = None
        try:
            text = self._run(line, may_wait=may_wait)
        except UsageError as error:
            text = f'{error}\nTry "help {error.command}" for more information'
        except Exception as error:  # a person at a console gets every failure as text
            name = line.split(maxsplit=1)[0] if line.split() else "monitor"
            text = f"Error: {as_qmp_error(error, doing=name).desc}"
        text = text.rstrip("\n")
        return text.replace("\n", "\r\n") + "\r\n" if text else ""

    def _run(self, line: str, *, may_wait: bool) -> str:
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise QMPError(f"cannot read the line: {error}") from None
        if not words:
            return ""
        name, arguments = words[0], words[1:]
        if name in ("help", "?"):
            return self._help(arguments)
        if name == "info" and arguments:
            name, arguments = f"info {arguments[0]}", arguments[1:]
        elif name == "info":
            return self._list(INFO_COMMANDS)
        command = self._find(name)
        call = HMPCall(self._monitor, command.name, arguments, may_wait=may_wait)
        text = command.run(call)
        self.after_reply = call.after_reply
        return text

    def _offered(self, table: Sequence[HMPCommand]) -> list[HMPCommand]:
        return [row for row in table if row.is_offered(self._monitor)]

    def _find(self, name: str) -> HMPCommand:
        for command in self._offered((*HMP_COMMANDS, *INFO_COMMANDS)):
            if name == command.name or name in command.aliases:
                return command
        raise QMPError(f"unknown command {name!r}: 'help' lists them")

    def _list(self, table: Sequence[HMPCommand]) -> str:
        return "\n".join(f"{row.usage} -- {row.help}" for row in self._offered(table))

    def _help(self, arguments: Sequence[str]) -> str:
        if arguments:
            name = " ".join(arguments)
            if name == "info":
                return self._list(INFO_COMMANDS)
            command = self._find(name)
            return f"{command.usage} -- {command.help}"
        return "\n".join(
            [
                "help|? [command] -- show the commands, or one of them",
                self._list(HMP_COMMANDS),
                "info [subcommand] -- show state; 'info' alone lists what can be shown",
            ]
        )

    def complete(self, line: str) -> list[str]:
        """Candidates for the last word of ``line`` (a new word after a blank), for the Tab key."""
        words = line.split()
        if not line or line[-1].isspace():
            words.append("")
        *before, current = words
        return sorted(word for word in self._candidates(before) if word.startswith(current))

    def _candidates(self, before: Sequence[str]) -> list[str]:
        commands = [row.name for row in self._offered(HMP_COMMANDS)]
        infos = [row.name.removeprefix("info ") for row in self._offered(INFO_COMMANDS)]
        match list(before):
            case []:
                return [*commands, "help", "info"]
            case ["info"] | ["help", "info"]:
                return infos
            case ["help"]:
                return [*commands, "info"]
            case ["migrate_set_capability"]:
                return list(self._monitor.service.capabilities())
            case ["migrate_set_capability", _]:
                return ["on", "off"]
            case ["migrate_set_parameter"]:
                return list(self._monitor.service.parameters())
            case ["migrate" | "migrate_incoming" | "migrate_recover"] | ["migrate", "-d" | "-r"]:
                return ["tcp:", "unix:", "exec:", "fd:", "file:"]
            case _:
                return []
