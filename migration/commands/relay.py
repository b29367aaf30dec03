"""``postcopy relay``: a running guest passes through us from one QEMU to another."""

from __future__ import annotations

import argparse

from .causes import telling_causes
from .output import Output
from .unpark import page_size_option

_DESCRIPTION = """\
Takes a QEMU's outgoing migration and passes it on to another QEMU without parking it: both legs
postcopy, the guest running all the time. A page the destination asks for is answered from what has
arrived, or asked of the source at once."""

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
    parser.add_argument("--page-size", action="append", default=[], metavar="BLOCK=SIZE")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Pass one on."""
    from migration.park.relay import Relay, RelayOptions
    from migration.runtime.transport import Listener, connect

    out = Output(json_lines=args.json)

    def tell(event: str, data: dict[str, object]) -> None:
        if event == "MIGRATION":
            out.say(f"towards {args.uri}: {data['status']}")

    options = RelayOptions(page_sizes=dict(page_size_option(text) for text in args.page_size))
    with telling_causes():
        listener = Listener(args.listen)
        try:
            out.say(f"listening on {listener.uri}")
            channel = listener.accept()
        finally:
            listener.close()
        relay = Relay(
            channel,
            lambda: connect(args.uri),
            options,
            tell,
            warn=lambda text: out.say(f"warning: {text}"),
        )
        try:
            relay.run()
        finally:
            relay.close()
    assert relay.migration is not None
    stats = relay.migration.ram.last_statistics
    out.emit({"result": "ok", "page_requests": stats["requests"], "pages": stats["pages_normal"]})
    out.say(f"passed on; {stats['requests']} pages were asked for on the way")
    return 0
