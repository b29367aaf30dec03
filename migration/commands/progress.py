"""A migration under way, shown: redrawn in place on a terminal, plain lines otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from migration.monitor.units import format_size

from .drive import Progress
from .output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_PLAIN_INTERVAL_S = 1.0
_BAR_WIDTH = 40


def line(progress: Progress) -> str:
    """One moment in one line."""
    return "  ".join([*_where(progress), *_rates(progress), *_eta(progress)])


def _where(progress: Progress) -> Iterator[str]:
    """The phase, and how much is left."""
    yield f"{progress.seconds:7.2f} s  {progress.status:<16}"
    total = progress.ram("total")
    if total:
        done = 1 - progress.ram("remaining") / total
        yield (
            f"{max(0.0, done):4.0%} of {format_size(int(total))}"
            f"  {format_size(int(progress.ram('remaining')))} left"
        )


def _eta(progress: Progress) -> Iterator[str]:
    eta_s = progress.eta_s
    if eta_s is not None and progress.status in ("active", "postcopy-active"):
        yield f"{eta_s:.1f} s to go"


def _rates(progress: Progress) -> Iterator[str]:
    """What moves: in postcopy apart, what was asked for and what is pushed behind it."""
    requests = progress.ram("postcopy-requests")
    if progress.pages_per_s:
        pushed = max(0.0, progress.pages_per_s - progress.requests_per_s)
        yield f"{pushed:,.0f} pages/s pushed" if requests else f"{pushed:,.0f} pages/s"
    if requests:
        yield f"{requests:,.0f} requests ({progress.requests_per_s:,.0f}/s)"
    if latency := _latency(progress):
        yield latency


def _latency(progress: Progress) -> str:
    """How long faults took so far; empty when nobody counts."""
    median, worst = progress.latency_us(0.5), progress.latency_us(0.99)
    if median is None or worst is None:
        return ""
    return f"faults p50 <{median:,} µs p99 <{worst:,} µs"


def _blocktime(progress: Progress) -> str:
    """How long vCPUs stood, where the destination counts it."""
    together = progress.destination.get("postcopy-blocktime")
    each = progress.destination.get("postcopy-vcpu-blocktime")
    if not isinstance(together, int) or not isinstance(each, list) or not each:
        return ""
    listed = ", ".join(str(milliseconds) for milliseconds in each)
    return f"vCPUs waited {listed} ms each, {together} ms all at once"


def summary(last: Progress, states: Mapping[str, str]) -> Iterator[str]:
    """How it ended, for people."""
    info = last.info
    cause = f": {info['error-desc']}" if "error-desc" in info else ""
    yield f"migration {last.status}{cause}"
    figures = []
    if "total-time" in info:
        figures.append(f"total {info['total-time']} ms")
    if "downtime" in info:
        figures.append(f"downtime {info['downtime']} ms")
    if last.ram("transferred"):
        figures.append(f"{format_size(int(last.ram('transferred')))} transferred")
        figures.append(f"{last.ram('mbps'):,.0f} Mbit/s")
    if last.ram("postcopy-requests"):
        figures.append(f"{last.ram('postcopy-requests'):,.0f} page requests")
    if figures:
        yield "  " + ", ".join(figures)
    felt = [text for text in (_latency(last), _blocktime(last)) if text]
    if felt:
        yield "  " + "; ".join(felt)
    if states:
        yield "  guest: " + ", ".join(f"{state} at the {vm}" for vm, state in states.items())


class Watcher:
    """Shows progress while it is entered.

    :param is_live: also between changes of status.
    :param emits: also as JSON objects, where the user asked for them.
    """

    def __init__(self, output: Output, *, is_live: bool, emits: bool = True) -> None:
        self._output = output
        self._is_live = is_live
        self._emits = emits
        self._live: Live | None = None
        self._status = ""
        self._shown_s = 0.0

    def __enter__(self) -> Self:
        if self._is_live and self._output.is_terminal:
            from rich.live import Live

            self._live = Live(console=self._output.console, transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(text)
        else:
            self._output.say(text)

    def show(self, progress: Progress) -> None:
        """Take one moment; print what is new about it."""
        is_new = progress.status != self._status
        is_due = self._is_live and progress.seconds - self._shown_s >= _PLAIN_INTERVAL_S
        if self._live is not None:
            self._live.update(_picture(progress))
            if is_new:
                self._live.console.print(line(progress))
        elif is_new or is_due:
            self._output.say(line(progress))
        if is_new or is_due:
            self._shown_s = progress.seconds
            if self._emits:
                self._output.emit(_moment(progress))
        self._status = progress.status


def _moment(progress: Progress) -> dict[str, object]:
    destination = {"destination": dict(progress.destination)} if progress.destination else {}
    return {
        "seconds": round(progress.seconds, 3),
        "migration": dict(progress.info),
        **destination,
    }


def _picture(progress: Progress) -> RenderableType:
    """The live view: where it is, a bar, and what moves; a narrow terminal holds it."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    total = progress.ram("total") or 1.0
    bar = ProgressBar(total=total, completed=total - progress.ram("remaining"), width=_BAR_WIDTH)
    rows = Table.grid()
    rows.add_row(Text("  ".join([*_where(progress), *_eta(progress)])))
    rows.add_row(bar)
    rows.add_row(Text("  ".join(_rates(progress))))
    return rows
