"""Every input in the corpus, once, through its target: what fuzzing found stays found."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.loaders import LOADERS, one_input
from tests.fuzz.targets import (
    CORPUS,
    PYTHON_TARGET,
    BuildError,
    build,
    c_targets,
    clang,
    corpus,
    run,
)
from tests.support.need import need


def test_every_target_has_a_corpus() -> None:
    names = {*c_targets(), PYTHON_TARGET}
    assert {path.name for path in CORPUS.iterdir()} == names
    for name in names:
        assert corpus(name)


@pytest.mark.kernel
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", c_targets())
def test_the_c_targets(name: str) -> None:
    """Built with address and undefined-behaviour sanitizers; any report ends it."""
    # No remedy for need(): a big compiler is not what a host promises that runs the tests.
    need(clang(), "no clang with libFuzzer (Debian: clang libclang-rt-dev)")
    try:
        binary = build(name)
    except BuildError as error:
        need("libclang_rt" not in str(error), "clang without libFuzzer (Debian: libclang-rt-dev)")
        raise
    done = run([str(binary), "-runs=0", str(CORPUS / name)], timeout_s=240)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", corpus(PYTHON_TARGET), ids=lambda path: path.name)
def test_the_loaders(path: Path) -> None:
    one_input(path.read_bytes())


@given(st.integers(0, len(LOADERS) - 1), st.binary(max_size=400))
def test_the_loaders_with_anything(loader: int, data: bytes) -> None:
    """Also without atheris somebody looks."""
    one_input(bytes([loader]) + data)


@given(st.data())
def test_the_loaders_with_damaged_inputs(data: st.DataObject) -> None:
    """Good inputs with a few bytes changed, cut or doubled."""
    wire = bytearray(data.draw(st.sampled_from(corpus(PYTHON_TARGET))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(1, max(1, len(wire) - 1)))
        match data.draw(st.sampled_from(["change", "cut", "double"])):
            case "change":
                wire[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "cut":
                del wire[at:]
            case _:
                wire[at:at] = wire[at:]
    one_input(bytes(wire))
