"""What runs in the child of an end-to-end test: one :class:`Side`, told by a socket what to do.

Started by :class:`tests.support.e2e_child.Child`. One JSON object a line in both directions:
commands in, answers and events out. Everything that touches guest RAM *holding the GIL* happens
here and never in the test's own process, so that a hang is this process's only.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import random
import resource
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from guestmem import TARGET_PAGE_BYTES, Backing
from migration.toyvm._native import ffi
from migration.toyvm.options import VCpuKind
from migration.wire.vmstate import U64, VMStateDescription
from tests.support.e2e_seccomp import deny_userfaultfd  # now: as nobody it may lie out of reach
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.pair import Side, pair

NOBODY = 65534


class Agent:
    """The commands; each method without an underscore is one."""

    def __init__(
        self, say: Callable[[dict[str, object]], None], leave: Callable[[], None] = lambda: None
    ) -> None:
        self._say = say
        self._leave = leave
        self._side: Side | None = None
        self._on_status: dict[str, list[Callable[[], None]]] = {}
        self._stop = threading.Event()

    @classmethod
    def of(cls, side: Side) -> Callable[..., Any]:
        """The commands for a side of the test's own process: ``call(name, *arguments)``."""
        agent = cls(lambda _message: None)
        agent._side = side
        return lambda do, *args: getattr(agent, do)(*args)

    @property
    def _one(self) -> Side:
        assert self._side is not None, "make comes first"
        return self._side

    def ready(self) -> None:
        """Answered once everything is imported and every thread of ours is there."""

    # -- the machine and its migrations -------------------------------------------------------

    def make(self, postcopy: bool = True, needs_kernel: bool = False, **options: Any) -> None:
        """A machine and its service; events are told from now on.

        :param needs_kernel: a machine whose accesses the kernel makes, as KVM's.
        """
        if "backing" in options:
            options["backing"] = Backing(options["backing"])
        if "vcpu" in options:
            options["vcpu"] = VCpuKind(options["vcpu"])
        if "extra_blocks" in options:
            options["extra_blocks"] = tuple((name, size) for name, size in options["extra_blocks"])
        self._side = Side(**options)
        if needs_kernel:
            machine = self._side.machine
            machine.__class__ = type(
                "KernelMachine", (type(machine),), {"needs_kernel_faults": property(lambda _: True)}
            )
        self._one.service.add_listener(self._event)
        self._one.service.set_capabilities({"postcopy-ram": postcopy})

    def _event(self, name: str, data: dict[str, object]) -> None:
        self._say({"event": name, "data": data})
        for action in self._on_status.get(str(data.get("status", name)), ()):
            action()

    def service(self, method: str, *args: Any, **kwargs: Any) -> object:
        """A method of the migration service, by name."""
        return getattr(self._one.service, method)(*args, **kwargs)

    def start(self) -> None:
        """The guest of a machine that was not migrated in."""
        self._one.machine.start()

    def migrate_by_postcopy(self, uri: str) -> None:
        """See :func:`tests.support.e2e_start.migrate_by_postcopy`."""
        migrate_by_postcopy(self._one.service, uri)

    def statistics(self) -> dict[str, object]:
        return self._one.machine.statistics()

    def heartbeats(self) -> list[int]:
        """Where each vCPU counts its operations, as addresses of this process: what another one
        can look at without asking us."""
        aux = self._one.machine.aux
        return [
            int(ffi.cast("uintptr_t", ffi.addressof(aux.state(index), "ops")))
            for index in range(aux.layout.smp)
        ]

    def ram(self) -> dict[str, list[int]]:
        """Where each block is in this process, and its length."""
        return {block.idstr: [block.host, block.used_length] for block in self._one.machine.ram}

    def run_state(self) -> str:
        return self._one.machine.run_state

    def missing(self, block: str, pages: list[int]) -> int:
        """How many of these target pages have not come."""
        incoming = self._one.service.incoming.migration
        assert incoming is not None
        received = incoming.ram.received[block]
        return sum(not received.test(page) for page in pages)

    def sweep(self) -> dict[str, object]:
        """Stop the guest and judge all of RAM."""
        self._one.service.stop_guest()
        return self._one.machine.sweep().as_json()

    def smaps(self) -> dict[str, int]:
        """Bytes in transparent huge pages, by block."""
        return {
            block.idstr: sum(report.anon_huge_pages for report in block.reports())
            for block in self._one.machine.ram
        }

    def close(self) -> None:
        """End the side."""
        self._one.close()

    def migrate_within(self, uri: str, pages: list[int], **options: Any) -> dict[str, object]:
        """A whole migration inside this process, while this thread touches pages through a view."""
        options["extra_blocks"] = tuple((name, size) for name, size in options["extra_blocks"])
        with pair(**options) as (source, target):
            source.machine.start()
            target.service.migrate_incoming(uri)
            source.service.set_parameters({"max-postcopy-bandwidth": 24 << 20})
            migrate_by_postcopy(source.service, uri)
            target.wait_event("RESUME")
            sums, missing = touch_pages(target, "toy.ram", pages)
            source.service.set_parameters({"max-postcopy-bandwidth": 0})
            statuses = [source.service.wait(20), target.service.wait(20)]
            target.service.stop_guest()
            return {
                "statuses": statuses,
                "missing": missing,
                "errors": target.machine.sweep().errors,
                "same": sums == touch_pages(source, "toy.ram", pages)[0],
            }

    def exit(self) -> None:
        """End this process as any Python program ends: every thread that is no daemon is joined."""
        sys.stdout.flush()
        self._leave()

    # -- touching RAM with the GIL in hand ------------------------------------------------------

    def touch(self, block: str, pages: list[int], *, on: str | None = None) -> None:
        """Read pages (and write one byte of every other back as it was) through a raw view: the
        thread that does it sleeps holding the GIL. Tells ``touched`` with a checksum for each page
        and how many were missing when it came to them.

        :param on: not on a thread of its own, now, but on the thread that announces this status or
            event, before it goes on: ``postcopy-active`` is the main thread between LISTEN and the
            devices.
        """
        if on is not None:
            self._on_status.setdefault(on, []).append(lambda: self._touch(block, pages))
            return
        threading.Thread(
            target=self._touch, args=(block, pages), name="gil-toucher", daemon=True
        ).start()

    def _touch(self, idstr: str, pages: Iterable[int]) -> None:
        sums, missing = touch_pages(self._one, idstr, pages)
        self._say({"event": "touched", "data": {"sums": sums, "missing": missing}})

    def touchy_device(self, block: str, pages: list[int]) -> None:
        """A device whose ``post_load`` touches pages through a raw view (both sides need it)."""

        class Touchy:
            value = 0

        def post_load(_device: Touchy, _version_id: int) -> None:
            self._touch(block, pages)

        vmsd = VMStateDescription(
            name="touchy", version_id=1, fields=(U64("value"),), post_load=post_load
        )
        self._one.machine.registry.register(vmsd, Touchy(), 0)

    def sleepy_device(self, block: str, offset: int) -> None:
        """A device whose ``post_load`` reads RAM through the block's accessor, without the GIL."""

        class Sleepy:
            value = 0

        def post_load(_device: Sleepy, _version_id: int) -> None:
            self._say({"event": "loading", "data": {}})
            self._one.machine.ram.by_idstr(block).read(offset, 8)

        vmsd = VMStateDescription(
            name="sleepy", version_id=1, fields=(U64("value"),), post_load=post_load
        )
        self._one.machine.registry.register(vmsd, Sleepy(), 0)

    def hold_gil(self, block: str, page: int) -> None:
        """One touch on a thread of its own, told before it happens. For pages that never come."""

        def touch() -> None:
            host = self._one.machine.ram.by_idstr(block).host
            tid = threading.get_native_id()
            self._say({"event": "touching", "data": {"host": host, "tid": tid}})
            touch_pages(self._one, block, [page])
            self._say({"event": "touched", "data": {"sums": [], "missing": 0}})

        threading.Thread(target=touch, name="gil-toucher", daemon=True).start()

    def busy(self, threads: int) -> None:
        """Python threads that never rest: computing, and asking the service as a monitor does."""

        def compute() -> None:
            while not self._stop.is_set():
                sum(range(2000))

        def ask() -> None:
            while not self._stop.is_set():
                self._one.service.query()
                self._one.machine.statistics()

        for number in range(threads):
            target = ask if number % 2 == 0 else compute
            threading.Thread(target=target, name=f"busy-{number}", daemon=True).start()

    def leave_behind(self) -> None:
        """What an orderly end must not leave: a descriptor and a thread."""
        self._left = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        threading.Thread(target=self._stop.wait, name="left-behind", daemon=True).start()

    def rest(self) -> None:
        """End the busy threads."""
        self._stop.set()

    # -- making the host refuse -----------------------------------------------------------------

    def become_nobody(self) -> None:
        """Drop every privilege, for good."""
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)

    def deny_userfaultfd(self) -> None:
        """The userfaultfd system call is not permitted, as in a container's default profile."""
        deny_userfaultfd()

    def run_out_of_descriptors(self, *, on: str) -> None:
        """From that status on no new file descriptor can be had."""

        def limit() -> None:
            in_use = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            filler = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (in_use, hard))
            try:
                while True:
                    filler.append(os.dup(0))  # the holes below the limit
            except OSError:
                pass

        self._on_status.setdefault(on, []).append(limit)


def touch_pages(side: Side, idstr: str, pages: Iterable[int]) -> tuple[list[int], int]:
    """Checksums of target pages read through a raw view, and how many had not come."""
    block = side.machine.ram.by_idstr(idstr)
    view = block.unsafe_view()
    incoming = side.service.incoming.migration
    received = incoming.ram.received[idstr] if incoming is not None else None
    sums, missing = [], 0
    for page in pages:
        missing += received is not None and not received.test(page)
        start = page * TARGET_PAGE_BYTES
        if page % 2:
            view[start + 8] = view[start + 8]
        sums.append(zlib.crc32(view[start : start + TARGET_PAGE_BYTES]))
    return sums, missing


def random_pages(seed: int, page_count: int, count: int) -> list[int]:
    """Different pages in no order."""
    return random.Random(seed).sample(range(page_count), count)


def main() -> None:
    serve(socket.socket(fileno=int(sys.argv[1])))


def serve(link: socket.socket) -> None:
    """Do what the other end of ``link`` says; returns after ``exit``, else with its end."""
    faulthandler.enable()
    lock = threading.Lock()
    leaving = threading.Event()

    def say(message: dict[str, object]) -> None:
        with lock:
            link.sendall(json.dumps(message).encode() + b"\n")

    def leave() -> None:
        # No signal: one that comes right before the main thread goes to sleep does not wake it.
        leaving.set()
        link.shutdown(socket.SHUT_RD)

    agent = Agent(say, leave)
    # Commands run on a thread of their own, in order; this one only reads, so that the end of the
    # test is noticed while a command waits.
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_serve, args=(agent, commands, say), name="agent", daemon=True).start()
    for line in link.makefile("r"):
        commands.put(json.loads(line))
    if not leaving.is_set():
        os._exit(0)  # the test is over; nothing here is worth an orderly end


def _serve(
    agent: Agent, commands: queue.Queue[dict[str, Any]], say: Callable[[dict[str, object]], None]
) -> None:
    while True:
        message = commands.get()
        try:
            answer = getattr(agent, message["do"])(*message["args"], **message["kwargs"])
        except Exception as error:
            say({"id": message["id"], "error": f"{type(error).__name__}: {error}"})
        else:
            say({"id": message["id"], "return": answer})


if __name__ == "__main__":
    main()
