"""A RAM block as a picture of characters: one cell for an equal number of pages each.

#  data          0  zero page         .  never sent
2  sent more than once                x  discarded, not sent again
"""

from __future__ import annotations

from collections.abc import Iterator

from .pagemap import BlockState, PageState

COLUMNS = 64
ROWS_MAX = 16
LEGEND = "# data   0 zero   2 sent more than once   x discarded and not sent again   . never sent"


def draw(block: BlockState) -> Iterator[tuple[int, str]]:
    """(offset of the first cell, cells) for each row.

    A cell of several pages shows what is most worth knowing: resent, then discarded, then data,
    then zero, then absent.
    """
    if block.states is None or not block.page_count:
        return
    per_cell = pages_per_cell(block)
    per_row = per_cell * COLUMNS
    for first in range(0, block.page_count, per_row):
        row = block.states[first : first + per_row]
        cells = (row[at : at + per_cell] for at in range(0, len(row), per_cell))
        yield first * block.target_page_bytes, "".join(_cell(cell) for cell in cells)


def pages_per_cell(block: BlockState) -> int:
    """Target pages in one cell: the least power of two that keeps the picture small."""
    per_cell = 1
    while block.page_count > per_cell * COLUMNS * ROWS_MAX:
        per_cell *= 2
    return per_cell


def _cell(states: bytearray) -> str:
    union = 0
    for value in set(states):
        union |= value
    if union & PageState.RESENT:
        return "2"
    if union & PageState.DISCARDED:
        return "x"
    if union & PageState.DATA:
        return "#"
    return "0" if union & PageState.ZERO else "."
