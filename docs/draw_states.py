"""Draws docs/states.md from the engine's tables, so that a diagram never tells another story.

``make docs`` writes the file; a test compares it with what this would write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar

from migration.engine.states import INCOMING, STATUS, Incoming, Status

_State = TypeVar("_State", bound=Enum)
_Input = TypeVar("_Input", bound=Enum)

PAGE = Path(__file__).with_name("states.md")

_INTRODUCTION = """\
# States

Drawn by `make docs` from the tables in `migration/engine/states.py`; do not edit by hand. An input
that a state has no arrow for is refused and changes nothing.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            _INTRODUCTION,
            "## The destination in postcopy\n",
            *diagram(INCOMING, Incoming.NONE),
            "## The status of a migration\n",
            *diagram(STATUS, Status.NONE),
        ]
    )


def diagram(table: Mapping[tuple[_State, _Input], _State], start: _State) -> Iterator[str]:
    """Lines of a Mermaid diagram. Inputs that lead from one state to another share an arrow."""
    arrows: dict[tuple[_State, _State], list[str]] = {}
    for (before, input_), after in table.items():
        arrows.setdefault((before, after), []).append(str(input_.value))
    states = dict.fromkeys([start, *(state for arrow in arrows for state in arrow)])
    yield "```mermaid"
    yield "stateDiagram-v2"
    for state in states:
        yield f'    state "{state.value}" as {state.name}'
    yield f"    [*] --> {start.name}"
    for (before, after), inputs in arrows.items():
        yield f"    {before.name} --> {after.name}: {', '.join(inputs)}"
    yield "```\n"


if __name__ == "__main__":
    main()
