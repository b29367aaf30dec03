"""Loading a user's own policies."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from migration.engine.policy import PushPolicy, SwitchoverPolicy

from .errors import MigrationError


def load_policy(spec: str) -> object:
    """Make the policy named by ``MODULE:CLASS`` or ``FILE.py:CLASS``, without arguments.

    A module is looked for where Python looks, and in the working directory.

    :returns: an object with ``decide`` (see :class:`SwitchoverPolicy`), ``next_pages`` (see
        :class:`PushPolicy`), or both.
    :raises MigrationError: there is no such thing, it cannot be made, or it is no policy.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise MigrationError(f"policy {spec!r}: write MODULE:CLASS or FILE.py:CLASS")
    try:
        policy = getattr(_module(where), name)()
    except Exception as error:  # the user's module may raise anything
        raise MigrationError(f"policy {spec!r} cannot be loaded: {error!r}") from error
    if not (has_switchover(policy) or has_push(policy)):
        raise MigrationError(f"policy {spec!r} has neither 'decide' nor 'next_pages'")
    return policy


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        folder = os.getcwd()
        sys.path.append(folder)
        try:
            return importlib.import_module(where)
        finally:
            sys.path.remove(folder)
    path = Path(where)
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise FileNotFoundError(where)
    module = importlib.util.module_from_spec(found)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def has_switchover(policy: object) -> bool:
    """It decides when to switch over."""
    return callable(getattr(policy, "decide", None))


def has_push(policy: object) -> bool:
    """It says what is pushed next."""
    return callable(getattr(policy, "next_pages", None))


def as_switchover(policy: object | None) -> SwitchoverPolicy | None:
    """The policy, if it decides that."""
    return policy if has_switchover(policy) else None  # type: ignore[return-value]


def as_push(policy: object | None) -> PushPolicy | None:
    """The policy, if it says that."""
    return policy if has_push(policy) else None  # type: ignore[return-value]
