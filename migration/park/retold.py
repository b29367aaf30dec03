"""What happens again and again, told seldom."""

from __future__ import annotations

import re


class Retold:
    """Which of many failures in a row are worth a line: the first, each with a new cause, and else
    the 2nd, 4th, 8th …. For one thread, but :meth:`forget` for any."""

    def __init__(self) -> None:
        self._causes: set[str] = set()
        self.count = 0

    def is_worth_a_line(self, cause: str) -> bool:
        """Note one failure. Numbers in its text make no new cause: offsets and ports differ."""
        kind = re.sub(r"0x[0-9a-f]+|\d+", "#", cause)
        is_new = kind not in self._causes
        self._causes.add(kind)
        self.count += 1
        return is_new or self.count & (self.count - 1) == 0

    @property
    def times(self) -> str:
        """`` again, 8 times by now``; empty for the first."""
        return "" if self.count < 2 else f" again, {self.count} times by now"

    def forget(self) -> None:
        """All is well again: the next failure is a first one."""
        self._causes.clear()
        self.count = 0
