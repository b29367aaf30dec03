"""``postcopy park``: take a VM in from any QEMU, and keep it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .causes import telling_causes
from .interruptible import run_interruptible
from .output import Output, UserError

if TYPE_CHECKING:
    from migration.park.manifest import Manifest
    from migration.park.take_in import TakingIn

_DESCRIPTION = """\
Takes in one outgoing migration of a stock QEMU (or of 'postcopy run') and keeps it as a
directory: RAM as sparse files, one per block, device state as the bytes it is, and a manifest.
Nothing needs to be known of the machine. Precopy, postcopy and a switch in mid-flight are taken
alike.

The directory is written under another name, synced and renamed *before* the source is told that
all is well, so QEMU never believes in a park that is not on disk. That takes a return path: set
capability return-path (or postcopy-ram) at the source; 'postcopy migrate' does. Without one the
source believes in the end as soon as its last byte is sent.

When something goes wrong in postcopy (the connection, a full disk), the guest is paused at its
source and 'park' waits for it to come back (migrate -r there), until Ctrl-C or --give-up-after. The
half of it that is here stays on disk then, and 'park --resume' goes on."""

_EPILOG = """\
examples:
  postcopy park --listen unix:/tmp/park.sock vm1      then, at QEMU:  migrate unix:/tmp/park.sock
  postcopy park --listen tcp:127.0.0.1:4444 vm1
  postcopy park vm.snapshot vm1                       a file QEMU wrote (exec:cat > f, file:)
  postcopy park --resume --listen unix:/tmp/again.sock vm1     go on; at QEMU: migrate -r URI
  postcopy parked vm1                                 what was kept
  postcopy unpark vm1 unix:/tmp/back.sock             give it back, at once

exit status: 0 parked, 1 not (the source was told, and nothing is left on disk), 2 usage"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "park",
        help="take a VM in from QEMU and keep it on disk",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", nargs="+", metavar="[FILE] DIR", help="snapshot file; new directory"
    )
    parser.add_argument(
        "--listen", metavar="URI", help="wait here for the source: tcp, unix, exec, fd"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a postcopy park that was interrupted"
    )
    parser.add_argument(
        "--give-up-after",
        type=float,
        metavar="SECONDS",
        help="how long a broken connection is waited out (default: until Ctrl-C)",
    )
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Take one in."""
    out = Output(json_lines=args.json)
    uri, directory = _what(args)
    with telling_causes():
        job = _Job(args, uri, directory, out)
        manifest = run_interruptible(job.run, job.stop)
    _tell(out, directory, manifest)
    return 0


class _Job:
    """Listening, then taking in; stopped at either."""

    def __init__(self, args: argparse.Namespace, uri: str, directory: Path, out: Output) -> None:
        from migration.park.manifest import ParkError
        from migration.park.partial import find_package
        from migration.runtime.transport import Listener

        if args.resume:
            find_package(directory)
        if directory.exists():
            raise ParkError(f"{directory} exists already: choose another name, or remove it")
        self._args = args
        self._directory = directory
        self._out = out
        self._listener = Listener(uri)
        self._taking: TakingIn | None = None

    def run(self) -> Manifest:
        from migration.park.take_in import TakingIn

        try:
            if self._args.listen:
                self._out.say(f"listening on {self._listener.uri}")
            channel = self._listener.accept()
        except BaseException:
            self._listener.close()
            raise
        self._taking = TakingIn(
            channel,
            self._directory,
            say=self._out.say,
            listener=self._listener,
            give_up_s=self._args.give_up_after,
            resume=self._args.resume,
        )
        return self._taking.run()

    def stop(self) -> None:
        """From the main thread, in the middle of :meth:`run`."""
        if self._taking is None:
            self._listener.wake()
        else:
            self._taking.stop()


def _what(args: argparse.Namespace) -> tuple[str, Path]:
    if args.listen and len(args.paths) == 1:
        return args.listen, Path(args.paths[0])
    if not args.listen and len(args.paths) == 2:
        return f"file:{args.paths[0]}", Path(args.paths[1])
    raise UserError("give --listen URI and a directory, or a snapshot FILE and a directory")


def _tell(out: Output, directory: Path, manifest: Manifest) -> None:
    out.emit(
        {
            "result": "ok",
            "directory": str(directory),
            "machine": manifest.machine,
            "run_state": manifest.run_state,
            "origin": manifest.origin,
            "ram_bytes": manifest.ram_bytes,
            "devices": len(manifest.devices),
        }
    )
    out.say(
        f"parked {manifest.machine} in {directory}: {manifest.ram_bytes >> 20} MiB of RAM, "
        f"{len(manifest.devices)} device sections, guest was {manifest.run_state}"
    )
