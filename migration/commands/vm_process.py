"""The process around one toy VM: made in order, ended in order, whatever happens in between.

The main thread makes everything and then only waits for the end
(:mod:`migration.monitor.lifecycle`); it never touches guest RAM. What happens is announced from a
thread of its own: whoever reports a change of state may hold the runtime's locks and must not wait
for a full pipe.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from migration.monitor.address import Address, parse_address
from migration.monitor.console import StdioConsole
from migration.monitor.context import Monitor
from migration.monitor.lifecycle import End, EndWaiter, end_with_parent
from migration.monitor.server import MonitorServer, timestamp
from migration.monitor.worker import SerialWorker
from migration.runtime.affinity import Placement
from migration.runtime.policies import load_policy
from migration.runtime.service import MigrationService
from migration.toyvm import ToyMachine

from .output import Output, UserError
from .vm_memory import describe, report_progress, warn
from .vm_options import toy_options

_ANNOUNCE_S = 1.0


class Announcer:
    """Prints what happens, one line or JSON object per change, without ever holding anybody up."""

    def __init__(self, output: Output, *, name: str) -> None:
        self._output = output
        self._name = name
        self._started_ns = time.monotonic_ns()
        self._worker = SerialWorker("announcer")
        self.console: StdioConsole | None = None

    def event(self, event: str, data: dict[str, object]) -> None:
        """A listener for the migration service. Any thread; returns at once."""
        text = _EVENT_TEXTS.get(event)
        if text is not None:
            self.tell(event, text.format(**data), data)

    def tell(self, event: str, text: str, data: dict[str, object]) -> None:
        """One line for people, one object for machines. Any thread; returns at once."""
        seconds = (time.monotonic_ns() - self._started_ns) / 1e9
        message: dict[str, object] = {"event": event, "timestamp": timestamp()}
        if data:
            message["data"] = data
        self._worker.submit(lambda: self._print(f"{self._name} {seconds:8.3f} s  {text}", message))

    def _print(self, line: str, message: dict[str, object]) -> None:
        try:
            if self.console is not None:
                self.console.notify(line)
            else:
                self._output.say(line)
            self._output.emit(message)
        except OSError:  # the reader is gone; the VM does not depend on it
            return

    def close(self) -> bool:
        """Print what is left; False when nobody reads it and the thread is stuck."""
        self._worker.stop()
        return self._worker.join(_ANNOUNCE_S)


_EVENT_TEXTS = {
    "MIGRATION": "migration: {status}",
    "STOP": "guest: stopped",
    "RESUME": "guest: running",
    "X_WARNING": "warning: {text}",
    "SHUTDOWN": "shutting down: {reason}",
}


class VMProcess:
    """One VM with its service, monitor and announcements. The main thread makes and closes it."""

    def __init__(self, args: argparse.Namespace, output: Output, waiter: EndWaiter) -> None:
        """Everything but the guest's start. What was made is closed again when something fails."""
        self._args = args
        self._waiter = waiter
        with ExitStack() as stack:
            self._is_clean = True
            self.announcer = Announcer(output, name=_name(args))
            self._on_close(stack, self.announcer.close)
            self.machine = ToyMachine(
                toy_options(args), on_prealloc=report_progress(self.announcer.tell)
            )
            stack.callback(self.machine.close)
            warn(self.machine, self.announcer.tell)
            self.service = MigrationService(
                self.machine, start_paused=args.start_paused, snapshot_dir=_snapshot_dir(args)
            )
            self.service.settings.choose_placement = _choose_placement
            if args.policy is not None:
                self.service.policy = load_policy(args.policy)
            self.monitor = Monitor(
                self.service, self.machine, on_quit=self._quit, name=args.name and _name(args)
            )
            self.server = MonitorServer(self.monitor)
            self._on_close(stack, self.server.close)
            stack.callback(self.service.close)  # first: ends what a client may be waiting for
            self.addresses = self._listen()
            self.service.add_listener(self.announcer.event)
            self.service.add_listener(self._watch_incoming)
            self.service.add_listener(self.server.forward)
            self.console = self._console()
            if self.console is not None:
                stack.callback(self.console.close)
            self._resources = stack.pop_all()

    def start(self) -> None:
        """Announce, wait for a migration or let the guest run. :raises MigrationError: cannot."""
        args, incoming = self._args, self._args.incoming
        listening: object = None
        if incoming not in (None, "defer"):
            listening = self.monitor.migrate_incoming(incoming)
        if args.loadvm is not None:
            self.service.loadvm(args.loadvm)
        self._announce_ready(listening)
        if incoming is None and args.loadvm is None and not args.start_paused:
            self.service.cont()
        if self.console is not None:
            self.console.start()
        if args.run_with == "exit-with-parent=on":
            end_with_parent(os.getppid(), lambda: self._request("host-signal", "the parent ended"))

    def close(self, end: End) -> bool:
        """Announce and end everything; False when a thread is stuck and was left behind."""
        data: dict[str, object] = {"guest": False, "reason": end.cause}
        self.server.emit("SHUTDOWN", data)
        self.announcer.tell("SHUTDOWN", f"ending: {end.text}", data)
        self._resources.close()
        return self._is_clean

    def _announce_ready(self, listening: object) -> None:
        options = self.machine.options
        data: dict[str, object] = {"pid": os.getpid(), "monitors": self.addresses}
        parts = [
            describe(self.machine),
            f"{options.smp} {options.vcpu} vCPU" + ("s" if options.smp != 1 else ""),
            f"machine {options.machine_type}",
            *self.addresses,
        ]
        if self._args.incoming is not None:
            where = self._args.incoming if listening is None else str(listening)
            data["incoming"] = where
            parts.append(f"incoming {where}")
        self.announcer.tell("X_READY", "ready: " + ", ".join(parts), data)

    def _listen(self) -> list[str]:
        bound: list[Address] = [
            self.server.listen_qmp(_address("--qmp", text)) for text in self._args.qmp
        ]
        bound += [
            self.server.listen_hmp(_address("--monitor", text))
            for text in self._args.monitor
            if text != "stdio"
        ]
        return [str(address) for address in bound]

    def _console(self) -> StdioConsole | None:
        if "stdio" not in self._args.monitor:
            return None
        console = StdioConsole(self.monitor)
        self.announcer.console = console
        return console

    def _on_close(self, stack: ExitStack, close: Callable[[], bool]) -> None:
        def note() -> None:
            self._is_clean = close() and self._is_clean

        stack.callback(note)

    def _quit(self, cause: str) -> None:
        self._request(cause, "quit")

    def _request(self, cause: str, text: str, *, status: int = 0) -> None:
        self._waiter.request(End(cause, text, status))

    def _watch_incoming(self, event: str, data: dict[str, object]) -> None:
        """A failed incoming migration ends the process, unless the user wants to look at it."""
        if event != "MIGRATION" or data.get("status") != "failed":
            return
        if self.machine.run_state == "inmigrate" and self.monitor.exits_on_incoming_error:
            self._request("host-error", "the incoming migration failed", status=1)


def run_vm(args: argparse.Namespace, output: Output) -> int:
    """Make a VM, run it until something ends it, end it. Main thread of its own process."""
    if args.verbose >= 2:
        logging.basicConfig(level=logging.DEBUG)
    waiter = EndWaiter()
    try:
        vm = VMProcess(args, output, waiter)
        try:
            vm.start()
        except BaseException:
            vm.close(End("host-error", "it could not be started", 1))
            raise
        end = waiter.wait()
        if end.status:
            _explain(vm)
        _close(vm, end, waiter)
        return end.status
    finally:
        waiter.close()


def _explain(vm: VMProcess) -> None:
    """Why the incoming migration failed, on stderr."""
    why = vm.service.query().get("error-desc", "no reason was given")
    print(f"postcopy run: the incoming migration failed: {why}", file=sys.stderr, flush=True)


def _close(vm: VMProcess, end: End, waiter: EndWaiter) -> None:
    """Close in a thread, so that a second signal is still heard; then the process ends at once."""
    done = End("", "closed")
    results: list[bool] = []

    def close() -> None:
        try:
            results.append(vm.close(end))
        finally:
            waiter.request(done)

    threading.Thread(target=close, name="closer", daemon=True).start()
    while (event := waiter.wait()) is not done:
        if event.cause == "host-signal":
            print(f"postcopy run: {event.text} again: ending at once", file=sys.stderr, flush=True)
            os._exit(1)
    if results != [True]:
        # A thread sleeps inside the machine (or closing failed): Python would wait for it, or trip
        # over it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.status or (0 if results else 1))


def _snapshot_dir(args: argparse.Namespace) -> Path | None:
    if args.snapshot_dir is None:
        return None
    directory = Path(args.snapshot_dir).absolute()
    if not directory.is_dir():
        raise UserError(f"--snapshot-dir {args.snapshot_dir} is no directory")
    return directory


def _name(args: argparse.Namespace) -> str:
    """QEMU allows ``guest=NAME,...``."""
    name = str(args.name or "vm")
    return name.removeprefix("guest=").partition(",")[0]


def _address(option: str, text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise UserError(f"{option} {error}") from None


def _choose_placement() -> Placement:
    """Some 30 ms of measuring, once, when the first migration begins."""
    from migration.bench.placement import choose_placement

    return choose_placement()
