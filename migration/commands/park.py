"""``postcopy park``: take a VM in from any QEMU, and keep it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .causes import telling_causes
from .durations import seconds
from .interruptible import run_interruptible
from .memory import memory_peak_bytes
from .output import Output, UserError

if TYPE_CHECKING:
    from migration.park.manifest import Manifest
    from migration.park.serve import ViewServer
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
  postcopy park vm.snapshot vm1                       a file QEMU wrote: exec:cat > f, file:
  postcopy park vm.snapshot,offset=0x1000 vm1         plain or mapped-ram, from that byte on
  postcopy park --serve vm1.view --listen unix:/tmp/park.sock vm1    readable while it comes
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
        "--serve",
        type=Path,
        metavar="SOCKET",
        help="let other tools read RAM here while it is still coming (migration.park.view)",
    )
    parser.add_argument(
        "--give-up-after",
        type=seconds,
        metavar="SECONDS",
        help="how long a broken connection is waited out (default: until Ctrl-C)",
    )
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Take one in."""
    out = Output(json_lines=args.json)
    directory = Path(args.paths[-1])
    if bool(args.listen) == (len(args.paths) == 2) or len(args.paths) > 2:
        raise UserError(
            "give --listen URI and a directory, or a snapshot FILE and a directory", status=2
        )
    if not args.listen and (args.resume or args.serve or args.give_up_after is not None):
        raise UserError(
            "--resume, --serve and --give-up-after are for a source that is waited for (--listen); "
            "a snapshot file is here already",
            status=2,
        )
    with telling_causes():
        _refuse_unless_possible(directory)
        job = _Listening(args, directory, out) if args.listen else _FromFile(args, directory, out)
        manifest = run_interruptible(job.run, job.stop)
    _tell(out, directory, manifest)
    return 0


def _refuse_unless_possible(directory: Path) -> None:
    """Before a source comes, which may not be able to go back."""
    from migration.park.manifest import ParkError

    if directory.exists():
        raise ParkError(f"{directory} exists already: choose another name, or remove it")
    if not directory.parent.is_dir():
        raise ParkError(f"{directory.parent} is no directory: make it first")
    if not os.access(directory.parent, os.W_OK | os.X_OK):
        raise ParkError(f"cannot write in {directory.parent}")


class _Listening:
    """Waiting for a source, then taking in; stopped at either."""

    def __init__(self, args: argparse.Namespace, directory: Path, out: Output) -> None:
        from migration.park.partial import find_package
        from migration.park.serve import ViewServer
        from migration.runtime.transport import Listener

        if args.resume:
            find_package(directory)
        self._args = args
        self._directory = directory
        self._out = out
        self._listener = Listener(args.listen)
        self._taking: TakingIn | None = None
        self._view: ViewServer | None = None
        if args.serve is not None:
            with self._closing_on_error():
                self._view = ViewServer(args.serve)

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._listener.close()
            if self._view is not None:
                self._view.finish(complete=False)
            raise

    def run(self) -> Manifest:
        from migration.park.take_in import TakingIn

        with self._closing_on_error():
            self._out.say(f"listening on {self._listener.uri}")
            channel = self._listener.accept()
        self._taking = TakingIn(
            channel,
            self._directory,
            say=self._out.say,
            listener=self._listener,
            give_up_s=self._args.give_up_after,
            resume=self._args.resume,
            view=self._view,
        )
        return self._taking.run()

    def stop(self) -> None:
        """From the main thread, in the middle of :meth:`run`."""
        if self._taking is None:
            self._listener.wake()
        else:
            self._taking.stop()


class _FromFile:
    """Taking in a snapshot file, of either layout."""

    def __init__(self, args: argparse.Namespace, directory: Path, out: Output) -> None:
        from migration.park.import_mapped import MappedImport, is_mapped
        from migration.park.take_in import TakingIn
        from migration.runtime.transport import Listener, split_offset

        path, offset = split_offset(args.paths[0], f"file:{args.paths[0]}")
        self._job: MappedImport | TakingIn
        if is_mapped(Path(path), offset):
            self._job = MappedImport(Path(path), offset, directory)
            return
        listener = Listener(f"file:{args.paths[0]}")
        try:
            channel = listener.accept()
        finally:
            listener.close()
        self._job = TakingIn(channel, directory, say=out.say, is_file=True)

    def run(self) -> Manifest:
        return self._job.run()

    def stop(self) -> None:
        """From the main thread, in the middle of :meth:`run`."""
        self._job.stop()


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
            "memory_peak_bytes": memory_peak_bytes(),
        }
    )
    out.say(
        f"parked {manifest.machine} in {directory}: {manifest.ram_bytes >> 20} MiB of RAM, "
        f"{len(manifest.devices)} device sections, guest was {manifest.run_state}"
    )
