"""``postcopy parked``: what a parked VM is."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .causes import telling_causes
from .output import Output, table_text

if TYPE_CHECKING:
    from migration.park.manifest import Manifest

_EPILOG = """\
examples:
  postcopy parked vm1
  postcopy parked vm1 --json

exit status: 0 whole, 1 damaged or no parked VM"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "parked",
        help="show a parked VM",
        description="Shows a parked VM: state, machine, RAM map, devices, size on disk.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--verify", action="store_true", help="check the checksums of RAM")
    parser.add_argument("--json", action="store_true", help="the manifest and figures on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Show one."""
    from dataclasses import asdict

    from migration.park.inspect import look
    from migration.park.manifest import load

    out = Output(json_lines=args.json)
    with telling_causes():
        manifest = load(args.directory)
        figures = look(args.directory, manifest, verify=args.verify)
    out.emit({**asdict(manifest), "disk_bytes": figures.disk_bytes, "damaged": figures.damaged})
    _show(out, manifest, figures.maps, figures.disk_bytes)
    for name in figures.damaged:
        out.say(f"damaged: {name}: its checksum is wrong")
    return 1 if figures.damaged else 0


def _show(out: Output, manifest: Manifest, maps: dict[str, str], disk_bytes: int) -> None:
    out.say(f"{manifest.machine}, {manifest.state.value}; guest was {manifest.run_state}")
    out.say(
        f"from {manifest.peer} by {manifest.origin}; {manifest.ram_bytes >> 10} KiB of RAM, "
        f"{disk_bytes >> 10} KiB on disk, {len(manifest.devices)} device sections"
    )
    rows = [("block", "KiB", "pages", "what is there (. zero)")]
    for block in manifest.blocks:
        size = f"{block.page_size >> 10}K"
        rows.append((block.idstr, str(block.used_length >> 10), size, maps[block.idstr]))
    out.say(table_text(rows))
    out.say(f"devices: {', '.join(_device_names(manifest))}")
    if manifest.block_devices:
        out.say(f"disks (not parked): {', '.join(manifest.block_devices)}")


def _device_names(manifest: Manifest) -> list[str]:
    """Every section's name once, with how often it is there."""
    counts = Counter(device.idstr for device in manifest.devices)
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
