"""A guest moves between the two hosts; both consoles side by side. ``make vagrant-demo``.

Run it beside the hosts: ``scripts/vagrant-hosts .venv/bin/python -m tests.hosts.demo --help``.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from tests.hosts.conftest import ADDRESSES
from tests.hosts.machines import Host
from tests.hosts.migrations import Ends
from tests.hosts.units import Machine, toy

_LINES = 14
_LOOK_S = 0.5


@dataclass
class Side:
    """One host's half of the screen: what its VMs wrote, and how its guest fares."""

    host: Host
    lines: "deque[str]" = field(default_factory=lambda: deque(maxlen=_LINES))
    state: str = "no VM"
    rate: float = 0.0
    vm: Machine | None = None
    _last: tuple[float, int] = (0.0, 0)

    def look(self) -> None:
        """Ask the VM how it is."""
        if self.vm is None:
            self.state, self.rate = "no VM", 0.0
            return
        self.state = self.vm.run_state
        now, ops = time.monotonic(), int(self.vm.execute("x-query-machine")["ops"])
        before, was = self._last
        self.rate = (ops - was) / (now - before) if before and ops >= was else 0.0
        self._last = now, ops

    @property
    def has_guest(self) -> bool:
        return self.state == "running"

    def panel(self) -> Panel:
        mark = "● the guest runs here" if self.has_guest else "○"
        head = f"{mark}  {self.state}, {self.rate:,.0f} touches/s"
        text = Text("\n".join(self.lines), no_wrap=True, overflow="ellipsis")
        style = "green" if self.has_guest else "dim"
        title = f"{self.host.name}  {self.host.address}"
        return Panel(
            Group(Text(head, style=style), Text(""), text), title=title, border_style=style
        )


class Screen:
    """Both sides, on a terminal as a picture, elsewhere line by line."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = sides
        self.console = Console()
        self._live: Live | None = None
        self._lock = threading.Lock()  # each side's reader writes lines while they are drawn

    def __enter__(self) -> "Screen":
        if self.console.is_terminal:
            self._live = Live(self._picture(), console=self.console, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update(self._picture())
            self._live.__exit__(None, None, None)

    def line(self, side: Side, text: str) -> None:
        with self._lock:
            side.lines.append(text)
            if self._live is None:
                where = "" if side is self.sides[0] else " " * 60
                print(f"{where}{side.host.name:>11} | {text}", flush=True)
        self.draw()

    def draw(self) -> None:
        if self._live is not None:
            self._live.update(self._picture())

    def _picture(self) -> Layout:
        layout = Layout()
        with self._lock:
            layout.split_row(*(Layout(side.panel()) for side in self.sides))
        return layout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vagrant-demo", description=__doc__)
    parser.add_argument("--trips", type=int, default=2, metavar="N", help="moves (2: forth, back)")
    parser.add_argument("-m", dest="ram", default="64M", metavar="SIZE", help="guest RAM (64M)")
    options = parser.parse_args(arguments)
    configuration = os.environ.get("POSTCOPY_HOSTS_SSH")
    if not configuration:
        print("vagrant-demo: no hosts here; run: make vagrant-demo", file=sys.stderr)
        return 2
    sides = [Side(Host(name, at, Path(configuration))) for name, at in ADDRESSES.items()]
    with contextlib.ExitStack() as stack:
        screen = stack.enter_context(Screen(sides))
        verdict = _travel(screen, options, stack)
    print(verdict)
    return 0 if verdict.startswith("OK") else 1


def _travel(screen: Screen, options: argparse.Namespace, stack: contextlib.ExitStack) -> str:
    """The guest goes from host to host; what its oracle says in the end."""
    shape = ("-m", options.ram, "--rate", "5000")
    here, there = screen.sides
    _start(screen, here, shape, stack)
    _watch(screen, lambda: here.rate > 0)
    for _ in range(options.trips):
        _start(screen, there, (*shape, "--incoming", "defer"), stack)
        _move(screen, here, there)
        here, there = there, here
    assert here.vm is not None
    here.vm.execute("stop")
    swept = here.vm.execute("x-oracle-sweep")
    pages, errors = swept["pages_checked"], swept["errors"]
    if errors:
        return f"FAILED: {errors} of {pages:,} pages are not what the guest wrote: {swept['bad']}"
    return f"OK: {options.trips} moves; all {pages:,} pages are what the guest wrote"


def _start(
    screen: Screen, side: Side, arguments: Sequence[str], stack: contextlib.ExitStack
) -> None:
    """A new VM on a host; the one that was there has given its guest away and ends."""
    if side.vm is not None:
        side.vm.close()
        side.lines.append("")
    side.vm = stack.enter_context(toy(side.host, side.host.configuration.parent, *arguments))
    stack.enter_context(_console(screen, side))
    side.vm.connect()


@contextlib.contextmanager
def _console(screen: Screen, side: Side) -> Iterator[None]:
    """Everything the VM writes appears on its side."""
    assert side.vm is not None
    follow = f"journalctl --follow --lines all --output cat --unit {side.vm.name}"
    child = subprocess.Popen(
        [*side.host.ssh(), follow],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def read() -> None:
        for line in child.stdout or ():
            if ".service" not in line:  # systemd's own words about the unit
                screen.line(side, line.rstrip())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        child.terminate()
        child.wait()
        thread.join()
        if child.stdout:
            child.stdout.close()


def _move(screen: Screen, here: Side, there: Side) -> None:
    """One postcopy migration, watched to its end."""
    assert here.vm is not None
    assert there.vm is not None
    ends = Ends(here.vm, there.vm)
    ends.into_postcopy()
    _watch(screen, lambda: there.vm is not None and there.vm.status == "completed")
    _watch(screen, lambda: there.rate > 0)
    word = there.vm.execute("query-migrate")["x-postcopy"]
    screen.line(there, f"{word['page-requests']} pages were asked for, the rest came behind")


def _watch(screen: Screen, is_done: Callable[[], bool]) -> None:
    while not is_done():
        for side in screen.sides:
            side.look()
        screen.draw()
        time.sleep(_LOOK_S)  # how often a person wants to see it change


if __name__ == "__main__":
    sys.exit(main())
