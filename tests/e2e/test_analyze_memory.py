"""A stream longer than what the analyser may use of memory is read in one pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import IO

import pytest

from migration.wire.constants import SectionType
from migration.wire.headers import (
    Configuration,
    SectionHeader,
    write_configuration,
    write_end_of_stream,
    write_file_header,
    write_footer,
    write_section_header,
    write_vmdescription,
)
from migration.wire.io import BytesWriter
from migration.wire.ram_setup import RamSetup, RamSetupBlock, write_ram_setup

_MIB = 1 << 20
_PAGE = 4096
_RAM = 256 * _MIB
_PART_PAGES = 2048
_PEAK_MAX = 128 * _MIB

# Its own peak, from inside: what wait4() tells of a child begins with that of whoever started it.
_ANALYZE = """
import sys
from pathlib import Path
from migration.commands.main import main
status = main(["analyze", "-", "--json"])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(status)
"""


def _write_stream(out: IO[bytes]) -> None:
    """RAM full of data, in parts, with little of it in memory at a time."""
    writer = BytesWriter()
    write_file_header(writer)
    write_configuration(writer, Configuration("none"))
    write_section_header(writer, SectionHeader(SectionType.START, 2, "ram", 0, 4))
    write_ram_setup(writer, RamSetup((RamSetupBlock("ram", _RAM),)))
    write_footer(writer, 2)
    out.write(writer.getvalue())
    page = os.urandom(_PAGE)
    for first in range(0, _RAM // _PAGE, _PART_PAGES):
        words = [
            ((first + index) * _PAGE | 0x28).to_bytes(8, "big") for index in range(_PART_PAGES)
        ]
        heads = [word + page for word in words]
        if first == 0:
            heads[0] = (0x08).to_bytes(8, "big") + b"\x03ram" + page
        out.write(b"\x02" + (2).to_bytes(4, "big") + b"".join(heads))
        out.write((0x10).to_bytes(8, "big") + b"\x7e" + (2).to_bytes(4, "big"))
    end = BytesWriter()
    write_end_of_stream(end)
    write_vmdescription(end, b"{}")
    out.write(end.getvalue())
    out.close()


@pytest.mark.e2e
def test_a_stream_larger_than_memory() -> None:
    """Through a pipe, so that nothing can be looked at twice."""
    child = subprocess.Popen(
        [sys.executable, "-c", _ANALYZE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        writing = threading.Thread(target=_write_stream, args=(child.stdin,))
        writing.start()
        lines = [json.loads(line) for line in child.stdout]
        peak_kib = int(child.stderr.read())
        writing.join(60)
    assert child.returncode == 0
    assert lines[-1]["kind"] == "end"
    assert lines[-1]["offset"] > _RAM
    assert lines[-2]["pages"] == {"normal": _RAM // _PAGE, "zero": 0, "resent": 0}
    assert peak_kib * 1024 < _PEAK_MAX
