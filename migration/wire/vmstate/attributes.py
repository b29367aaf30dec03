"""Reaching a value by the name it has on the wire: ``status``, ``queue.count``,
``bus[0].drives``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

_PART = re.compile(r"\.?([A-Za-z_]\w*)|\[(\d+)\]")

WHOLE = ""
"""An attribute path for the object itself."""


class AttributePath:
    """A compiled path. An empty path means the object itself (it cannot be assigned)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._steps: list[str | int] = []
        at = 0
        while at < len(path):
            match = _PART.match(path, at)
            if match is None:
                raise ValueError(f"{path!r} is not an attribute path")
            name, index = match.groups()
            self._steps.append(name if name is not None else int(index))
            at = match.end()

    def get(self, obj: Any) -> Any:
        """The value; raises AttributeError or IndexError when a step is missing."""
        for step in self._steps:
            obj = getattr(obj, step) if isinstance(step, str) else obj[step]
        return obj

    def get_or_none(self, obj: Any) -> Any:
        """The value, or None when it was never set."""
        try:
            return self.get(obj)
        except (AttributeError, IndexError):
            return None

    def set(self, obj: Any, value: Any) -> None:
        """Assign. Assigning the object itself is only right when it was changed in place."""
        if not self._steps:
            return
        for step in self._steps[:-1]:
            obj = getattr(obj, step) if isinstance(step, str) else obj[step]
        last = self._steps[-1]
        if isinstance(last, str):
            setattr(obj, last, value)
        else:
            obj[last] = value


Number = int | str | Callable[[Any], int]
"""A count or length: a constant, the path of an attribute, or a function of the object."""


def number_getter(source: Number) -> Callable[[Any], int]:
    """A function that fetches a :data:`Number` from an object."""
    if isinstance(source, int):
        constant = source
        return lambda obj: constant
    if isinstance(source, str):
        path = AttributePath(source)
        return lambda obj: operator.index(path.get(obj))
    return source
