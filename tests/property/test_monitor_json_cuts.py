"""However a byte stream is cut, the monitor reads the same values from it, in bounded memory."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from migration.monitor.json_stream import MESSAGE_BYTES_MAX, JSONSplitter, Malformed, parse

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)
NOISE = st.binary(max_size=200) | st.text("{}[]\"'\\,: \n\xffab1", max_size=200).map(
    lambda text: text.encode("latin-1")
)


def feed_in_pieces(data: bytes, cuts: list[int]) -> list[object]:
    splitter = JSONSplitter()
    out: list[object] = []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in pairwise(edges):
        out += splitter.feed(data[start:end])
    return out


@given(st.lists(JSON, max_size=5), st.booleans(), st.lists(st.integers(0, 10_000), max_size=8))
def test_values_survive_any_cut(values: list[object], is_ascii: bool, cuts: list[int]) -> None:
    data = b"".join(json.dumps(v, ensure_ascii=is_ascii).encode() + b"\n" for v in values)
    assert feed_in_pieces(data, cuts) == values


@given(NOISE, st.lists(st.integers(0, 10_000), max_size=8))
def test_noise_is_read_the_same_however_it_is_cut(noise: bytes, cuts: list[int]) -> None:
    assert feed_in_pieces(noise, cuts) == JSONSplitter().feed(noise)


@given(st.lists(NOISE, max_size=5))
def test_after_any_noise_a_command_gets_through(noise: list[bytes]) -> None:
    """0xFF resets; what follows is read whatever came before."""
    splitter = JSONSplitter()
    for piece in noise:
        splitter.feed(piece)
    splitter.feed(b"\xff")
    assert splitter.feed(b'{"execute":"stop"}') == [{"execute": "stop"}]
    assert len(splitter._stored) <= MESSAGE_BYTES_MAX


@given(st.binary(max_size=300))
def test_parse_never_raises(raw: bytes) -> None:
    value = parse(raw)
    if not isinstance(value, Malformed):
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # can be sent back
