"""What the user set for the migrations of one machine."""

from __future__ import annotations

from collections.abc import Mapping

from migration.engine.settings import (
    OFFERED,
    SettingError,
    Value,
    change_capabilities,
    change_parameters,
    default_parameters,
)

from .affinity import ChoosePlacement, Placement
from .errors import MigrationError
from .transport import FdLookup


class Settings:
    """Capabilities and parameters, and what the program around gave.

    A change replaces all capabilities, or all parameters, at once: who reads needs no lock and sees
    them before or after it. Who changes them holds the session's.

    :ivar capabilities: every capability on offer and whether it is on.
    :ivar parameters: every parameter and its value.
    :ivar start_paused: QEMU's ``-S``: an incoming guest waits for ``cont``.
    :ivar fds: looks up ``fd:NAME``; the descriptor it returns is the channel's to close.
    :ivar policy: a user's own, see :func:`migration.runtime.policies.load_policy`; None: QEMU's.
    :ivar choose_placement: measures where the threads of a migration run best; asked once, at the
        start of the first one. None: left to the scheduler.
    """

    def __init__(self, *, start_paused: bool = False) -> None:
        self.capabilities: Mapping[str, bool] = dict(OFFERED)
        self.parameters: Mapping[str, Value] = default_parameters()
        self.start_paused = start_paused
        self.fds: FdLookup | None = None
        self.policy: object | None = None
        self.choose_placement: ChoosePlacement | None = None
        self._placement: Placement | None = None

    def change_capabilities(self, changes: Mapping[str, bool]) -> None:
        """:raises MigrationError: unknown or not offered. Nothing changed."""
        try:
            self.capabilities = change_capabilities(self.capabilities, changes)
        except SettingError as error:
            raise MigrationError(str(error)) from None

    def change_parameters(self, changes: Mapping[str, object]) -> None:
        """:raises MigrationError: unknown, of another type, out of range. Nothing changed."""
        try:
            self.parameters = change_parameters(self.parameters, changes)
        except SettingError as error:
            raise MigrationError(str(error)) from None

    def number(self, name: str) -> int:
        """A parameter as it is now."""
        return int(self.parameters[name])

    def placement(self) -> Placement | None:
        """Where threads run best; the first call measures it, if it is to be measured."""
        if self._placement is None and self.choose_placement is not None:
            self._placement = self.choose_placement()
        return self._placement
