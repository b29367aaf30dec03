"""What is learned from a QEMU's monitor, and how it meets what the user says."""

from __future__ import annotations

import pytest

from migration.commands.incoming_qemu import (
    merge_page_sizes,
    page_size_option,
    parse_ramblocks,
)
from migration.commands.output import UserError

# As QEMU 7.2 and 10.0 print them; the newer one has two columns more.
OLD = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000002000000 0x0000000002000000
    0000:00:02.0/vga.vram    4 KiB  0x0000000002080000 0x0000000001000000 0x0000000001000000
"""
NEW = """\
              Block Name    PSize              Offset               Used              Total \
               HVA  RO
                    mem0    2 MiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 \
0x00007f1f00000000  rw
   /rom@etc/acpi/tables    4 KiB  0x0000000040040000 0x0000000000020000 0x0000000000200000 \
0x00007f1fa0000000  ro
                     big    1 GiB  0x0000000080000000 0x0000000040000000 0x0000000040000000 \
0x00007f1f40000000  rw
"""


def test_blocks_of_old_and_new() -> None:
    assert parse_ramblocks(OLD) == {"pc.ram": 4096, "0000:00:02.0/vga.vram": 4096}
    assert parse_ramblocks(NEW) == {"mem0": 2 << 20, "/rom@etc/acpi/tables": 4096, "big": 1 << 30}
    assert parse_ramblocks("unknown command: 'info ramblock'\n") == {}


@pytest.mark.parametrize(
    ("text", "size"),
    [("pc.ram=2M", 2 << 20), ("pc.ram=4096", 4096), ("a=b=4k", 4096), ("x=1G", 1 << 30)],
)
def test_page_size_option(text: str, size: int) -> None:
    name, _, _ = text.rpartition("=")
    assert page_size_option(text) == (name, size)


@pytest.mark.parametrize("text", ["pc.ram", "=2M", "pc.ram=", "pc.ram=2X", "pc.ram=3M", "a=512"])
def test_no_page_size(text: str) -> None:
    with pytest.raises(UserError) as caught:
        page_size_option(text)
    assert caught.value.status == 2


def test_what_is_said_and_what_is_known() -> None:
    assert merge_page_sizes({"a": 4096}, {}) == {"a": 4096}
    assert merge_page_sizes({}, {"a": 2 << 20}) == {"a": 2 << 20}
    assert merge_page_sizes({"a": 4096}, {"a": 4096, "b": 1 << 30}) == {"a": 4096, "b": 1 << 30}
    with pytest.raises(UserError, match="has pages of 2048K"):
        merge_page_sizes({"a": 4096}, {"a": 2 << 20})
