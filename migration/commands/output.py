"""How every verb talks: text for people, a JSON object per line for machines, helpful errors.

With ``--json`` stdout carries nothing but objects, one to a line; text goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class UserError(Exception):
    """Something the user can act on: printed without a traceback, ends the verb.

    :ivar hint: what to try; None when there is nothing to suggest.
    :ivar status: the process's exit status.
    """

    def __init__(self, what: str, *, hint: str | None = None, status: int = 1) -> None:
        super().__init__(what)
        self.hint = hint
        self.status = status


class Output:
    """Where a verb's words go. Threads: one at a time.

    :param json_lines: the user asked for ``--json``.
    """

    def __init__(self, *, json_lines: bool) -> None:
        self.json_lines = json_lines
        self._console: Console | None = None

    @property
    def text_stream(self) -> TextIO:
        """Where text for people goes."""
        return sys.stderr if self.json_lines else sys.stdout

    @property
    def console(self) -> Console:
        """A rich console on :attr:`text_stream`; plain text when that is no terminal."""
        if self._console is None:
            from rich.console import Console  # slow to import: only who prints with it pays

            self._console = Console(file=self.text_stream, highlight=False, soft_wrap=True)
        return self._console

    @property
    def is_terminal(self) -> bool:
        """A person watches: progress may be redrawn in place."""
        return self.text_stream.isatty()

    def say(self, text: str) -> None:
        """One line for people."""
        print(text, file=self.text_stream, flush=True)

    def emit(self, message: Mapping[str, object]) -> None:
        """One object for machines; nothing without ``--json``."""
        if self.json_lines:
            print(json.dumps(message), flush=True)


def table_text(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Rows of cells in aligned columns, plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        (indent + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


def histogram_lines(
    buckets: Iterable[tuple[str, int]], *, width: int = 40, indent: str = "  "
) -> list[str]:
    """A horizontal bar for each (label, count); empty buckets at both ends are left out."""
    rows = list(buckets)
    used = [index for index, (_, count) in enumerate(rows) if count]
    if not used:
        return []
    rows = rows[used[0] : used[-1] + 1]
    label_width = max(len(label) for label, _ in rows)
    count_width = max(len(str(count)) for _, count in rows)
    most = max(count for _, count in rows)
    lines = []
    for label, count in rows:
        eighths = -(-count * width * 8 // most)  # at least a sliver for a single one
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        lines.append(f"{indent}{label:>{label_width}}  {count:>{count_width}}  {bar}".rstrip())
    return lines
