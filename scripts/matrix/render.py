"""The sections of the comparison as a page: Markdown, and HTML that needs nothing else."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from scripts.matrix import sections, vm
from scripts.matrix.runs import Crossing, Run
from scripts.matrix.sections import Section
from scripts.validate import compare

_TITLE = "Kernels side by side"
_SEE_ALSO = "What the differences mean for a program: [kernel-support.md](kernel-support.md)."


def write(
    runs: Sequence[Run], crossings: Sequence[Crossing], markdown_to: Path, html_to: Path
) -> None:
    """Both pages, of the same sections."""
    found = sections.sections(runs, crossings)
    markdown_to.write_text(markdown(found, runs))
    html_to.write_text(page(found, runs))


def markdown(found: Sequence[Section], runs: Sequence[Run]) -> str:
    """The whole page."""
    first, _, rest = sections.INTRODUCTION.partition("\n\n")
    lines = [f"# {_TITLE}", "", first, _SEE_ALSO, "", rest]
    for section in found:
        lines += ["", f"## {section.title}"]
        lines += ["", section.text] if section.text else []
        if section.rows:
            lines += ["", _line(section.head), _line(["---"] * len(section.head))]
            lines += [_line(row) for row in section.rows]
        lines += ["", "```text", section.verbatim, "```"] if section.verbatim else []
    if any(run.cases for run in runs):
        lines += ["", "## Every case", "", compare.markdown(_comparable(runs))]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(found: Sequence[Section], runs: Sequence[Run]) -> str:
    """The same as HTML; the table of every case comes last."""
    parts = [f"<h1>{_TITLE}</h1>"]
    parts += [f"<p>{_inline(text)}</p>" for text in sections.INTRODUCTION.split("\n\n")]
    for section in found:
        parts.append(f"<h2>{_inline(section.title)}</h2>")
        parts += [f"<p>{_inline(section.text)}</p>"] if section.text else []
        if section.rows:
            parts.append("<table>" + _row(section.head, "th"))
            parts += [_row(row, "td") for row in section.rows]
            parts.append("</table>")
        parts += [f"<pre>{html.escape(section.verbatim)}</pre>"] if section.verbatim else []
    return compare.html_page(_comparable(runs), before="\n".join(parts))


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"


def _inline(text: str) -> str:
    """The two marks the sections use."""
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r'<b class="fail">\1</b>', safe)


def _comparable(runs: Sequence[Run]) -> list[compare.SavedRun]:
    return [compare.load(run.folder / vm.CASES) for run in runs if run.cases]
