"""Values are cut out of a byte stream as QEMU's monitor does it; nothing grows without bound."""

from __future__ import annotations

import pytest

from migration.monitor.json_stream import (
    MESSAGE_BYTES_MAX,
    NESTING_MAX,
    JSONSplitter,
    Malformed,
    parse,
)


def test_commands_need_no_separator() -> None:
    """qemu.qmp sends commands back to back without a line end."""
    assert JSONSplitter().feed(b'{"a":1}{"b":[2]} \r\n{"c":"}"}') == [
        {"a": 1},
        {"b": [2]},
        {"c": "}"},
    ]


def test_single_quotes_are_accepted() -> None:
    """A person at a socket writes them; QEMU takes them."""
    assert parse(b"{'execute': 'it\\'s \"so\"'}") == {"execute": 'it\'s "so"'}


@pytest.mark.parametrize(
    "junk", [b"junk\n", b"}", b"]", b",", b"{]", b'{"a":}', b'"unfinished\n', b"nul ", b"\xff"]
)
def test_junk_costs_one_error_and_the_next_command_is_read(junk: bytes) -> None:
    first, second = JSONSplitter().feed(junk + b'{"execute":"stop"}')
    assert isinstance(first, Malformed)
    assert second == {"execute": "stop"}


def test_0xff_throws_away_a_half_received_command() -> None:
    first, second = JSONSplitter().feed(b'{"execute": [[\xff{"execute":"stop"}')
    assert isinstance(first, Malformed)
    assert second == {"execute": "stop"}


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":2}',
        b"[NaN]",
        b"[1e999]",
        b'["\\ud800"]',
        b'["\xc3\x28"]',
        b"[" + b"9" * 5000 + b"]",
    ],
)
def test_what_json_cannot_mean_is_malformed(text: bytes) -> None:
    assert isinstance(parse(text), Malformed)


def test_an_overlong_value_is_one_error_and_is_not_kept() -> None:
    splitter = JSONSplitter()
    out = splitter.feed(b'["')
    for _ in range(4):
        out += splitter.feed(b"x" * MESSAGE_BYTES_MAX)
        assert len(splitter._stored) <= MESSAGE_BYTES_MAX
    out += splitter.feed(b'"]{"execute":"stop"}')
    assert isinstance(out[0], Malformed)
    assert out[1:] == [{"execute": "stop"}]


def test_deep_nesting_is_one_error() -> None:
    depth = 100_000
    first, second = JSONSplitter().feed(b"[" * depth + b"]" * depth + b'{"execute":"stop"}')
    assert isinstance(first, Malformed)
    assert second == {"execute": "stop"}
    assert JSONSplitter().feed(b"[" * NESTING_MAX + b"]" * NESTING_MAX) != [first]
