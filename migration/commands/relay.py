"""``postcopy relay``: a running guest passes through us from one QEMU to another."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .causes import telling_causes
from .incoming_qemu import add_arguments, ask_destination, ask_status
from .interruptible import run_interruptible
from .output import Output

if TYPE_CHECKING:
    from migration.park.relay import Relay

_DESCRIPTION = """\
Takes a QEMU's outgoing migration and passes it on to another QEMU without parking it: both legs
postcopy, the guest running all the time. A page the destination asks for is answered from what has
arrived, or asked of the source at once.

A connection that breaks on the way is mended: migrate -r at the source, migrate_recover at the
destination. Only this process has the pages in between: told to stop then it goes on until the
destination has them; told again it stops. When the very last word of the destination is lost, its
monitor tells whether it has everything: with --qmp that is asked here."""

_EPILOG = """\
examples:
  at B:   migrate_set_capability postcopy-ram on
          migrate_incoming unix:/tmp/b.sock
  postcopy relay --listen unix:/tmp/a.sock unix:/tmp/b.sock
  at A:   migrate_set_capability postcopy-ram on
          migrate -d unix:/tmp/a.sock
          migrate_start_postcopy

exit status: 0 passed on, 1 not (the message says who has the guest), 2 usage"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "relay",
        help="pass a guest on from one QEMU to another, live",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--listen", required=True, metavar="URI", help="wait here for the source")
    parser.add_argument("uri", metavar="URI", help="where the destination listens")
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Pass one on."""
    out = Output(json_lines=args.json)
    with telling_causes():
        job = _Job(args, out)
        stats = run_interruptible(job.run, job.stop)
    out.emit({"result": "ok", "page_requests": stats["requests"], "pages": stats["pages_normal"]})
    out.say(f"passed on; {stats['requests']} pages were asked for on the way")
    return 0


class _Job:
    """Listening, then passing on; stopped at either."""

    def __init__(self, args: argparse.Namespace, out: Output) -> None:
        from migration.park.relay import RelayOptions
        from migration.runtime.transport import Listener

        destination = ask_destination(args, resume=False)
        if args.qmp:
            out.say(f"the destination listens at {args.uri}")
        self._options = RelayOptions(
            destination.page_sizes,
            preempt=destination.preempt,
            is_old=destination.is_old,
            ask=lambda: ask_status(args.qmp),
        )
        self._args = args
        self._out = out
        self._listener = Listener(args.listen)
        self._relay: Relay | None = None
        self._told: set[str] = set()  # since the destination was last whole

    def run(self) -> Mapping[str, int]:
        from migration.park.links import SourceLinks
        from migration.park.relay import Relay
        from migration.runtime.transport import connect

        try:
            self._out.say(f"listening on {self._listener.uri}")
            channel = self._listener.accept()
        except BaseException:
            self._listener.close()
            raise
        self._relay = Relay(
            channel,
            lambda: connect(self._args.uri),
            self._options,
            self._tell,
            say=self._out.say,
            links=SourceLinks(self._listener, give_up_s=None),
        )
        try:
            self._relay.run()
        finally:
            self._relay.close()
        assert self._relay.migration is not None
        return self._relay.migration.ram.last_statistics

    def stop(self) -> bool:
        """From the main thread, in the middle of :meth:`run`; False: it goes on."""
        if self._relay is None:
            self._listener.wake()
            return True
        return self._relay.stop()

    def _tell(self, event: str, data: dict[str, object]) -> None:
        if event == "X_WARNING":
            self._out.say(f"warning: {data['text']}")
        if event != "MIGRATION":
            return
        status = str(data["status"])
        if status == "postcopy-active":
            self._told.clear()
        if status not in self._told:  # each try to recover goes through the same ones
            self._told.add(status)
            self._out.say(f"towards {self._args.uri}: {status}")
