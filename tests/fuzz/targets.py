"""The fuzz targets of this folder: what they are and how they are built.

A C target is ``NAME_fuzz.c`` with libFuzzer's entry point; like a driver of ``tests/native`` its
first comment lists what it is linked with. The Python target needs no build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.native.run_drivers import ROOT, include_folders, sources

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
BUILD = ROOT / "build" / "fuzz"
PYTHON_TARGET = "loaders"

_FLAGS = (
    *("-std=gnu11", "-O1", "-g", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror"),
    *("-pthread", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"),
)


def c_targets() -> list[str]:
    """Names of the targets in C."""
    return sorted(path.stem.removesuffix("_fuzz") for path in HERE.glob("*_fuzz.c"))


def clang() -> str | None:
    """A clang; whether it has libFuzzer, the first build tells."""
    return os.environ.get("CLANG") or shutil.which("clang")


class BuildError(Exception):
    """The compiler refused; its words are the message."""


def build(name: str, *, into: Path = BUILD) -> Path:
    """Compile a C target unless it is newer than all it is made of.

    :raises BuildError: no clang, no libFuzzer (package ``libclang-rt-dev``), or warnings.
    """
    compiler = clang()
    if compiler is None:
        raise BuildError("no clang; remedy: apt-get install clang libclang-rt-dev")
    target, binary = HERE / f"{name}_fuzz.c", into / name
    parts, folders = sources(target), include_folders(target)
    headers = [header for folder in [HERE, *folders] for header in folder.glob("*.h")]
    newest = max(path.stat().st_mtime for path in (*parts, *headers) if path.exists())
    if binary.exists() and binary.stat().st_mtime > newest:
        return binary
    into.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{folder}" for folder in [HERE, *folders]]
    argv = [compiler, *_FLAGS, *includes, *map(str, parts), "-o", str(binary)]
    answer = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    if answer.returncode != 0:
        raise BuildError(f"{target.name}: {answer.stderr}")
    return binary


def command(name: str, *, into: Path = BUILD) -> list[str]:
    """How a target is started; options and corpus folders follow. :raises BuildError: it is not."""
    if name == PYTHON_TARGET:
        return [sys.executable, "-m", "tests.fuzz.loaders_fuzz"]
    return [str(build(name, into=into))]


def corpus(name: str) -> list[Path]:
    """The inputs kept in the repository."""
    return sorted((CORPUS / name).iterdir())


def run(argv: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a target and keep what it says."""
    return subprocess.run(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        check=False,
        cwd=ROOT,
        timeout=timeout_s,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=0"},
    )
