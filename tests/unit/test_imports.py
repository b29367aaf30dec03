"""Imports point down, the pure rooms stay pure, and the page size stands in one place.

Read from the source with ``ast``: nothing is imported, so this runs without the C parts built.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("uffd", "guestmem", "migration")

# What only the rooms with threads, sockets and clocks may touch.
BLOCKING = frozenset(
    {
        *("asyncio", "fcntl", "mmap", "multiprocessing", "select", "selectors", "signal", "socket"),
        *("ssl", "subprocess", "threading", "time"),
    }
)
PURE_MEMORY = ("guestmem.geometry", "guestmem.bitmap")
LOWER = ("uffd", "guestmem")


@dataclass(frozen=True)
class Room:
    """What a package, or one module of it, may import of ours, and which stdlib it must not."""

    name: str
    may: tuple[str, ...]  # besides itself
    never: frozenset[str] = frozenset()


# The longest matching name decides. Lower rooms first.
ROOMS = (
    Room("uffd", ()),
    Room("guestmem", ("uffd",)),
    Room("guestmem.geometry", (), BLOCKING | {"ctypes"}),
    Room("guestmem.bitmap", ("guestmem",), BLOCKING | {"ctypes"}),
    Room("migration", ()),
    Room("migration.native", LOWER),
    Room("migration.wire", (*PURE_MEMORY, "migration.native"), BLOCKING),
    Room("migration.engine", (*PURE_MEMORY, "migration.wire", "migration.native"), BLOCKING),
    Room(
        "migration.runtime",
        (*LOWER, "migration.native", "migration.wire", "migration.engine"),
    ),
    Room(
        "migration.toyvm",
        (*LOWER, "migration.native", "migration.wire", "migration.runtime.machine"),
    ),
    Room("migration.analyze", (*PURE_MEMORY, "migration.native", "migration.wire")),
    Room(
        "migration.park",
        (
            *LOWER,
            "migration.native",
            "migration.wire",
            "migration.engine",
            "migration.analyze",
            "migration.runtime",
        ),
    ),
    Room("migration.probe", (*LOWER, "migration.native")),
    Room("migration.tracee", LOWER),
    Room("migration.monitor", ("migration.runtime", "migration.wire", "migration.engine")),
    Room("migration.bench", (*LOWER, "migration")),
    Room("migration.commands", (*LOWER, "migration")),
    Room("migration.__main__", ("migration.commands",)),
    Room("scripts", LOWER),
)

# The one place that knows how large a target page is.
PAGE_SIZE_HOME = "guestmem.geometry"
PAGE_SIZE = 4096


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> Room:
        """The room that decides for it."""
        found = [room for room in ROOMS if is_within(self.name, room.name)]
        assert found, f"{self.path} is in no room of this test"
        return max(found, key=lambda room: len(room.name))

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and full name of everything imported, relative ones resolved."""
        package = self.name.split(".")
        if self.path.name != "__init__.py":
            package = package[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
                # "from guestmem import geometry" is an import of guestmem.geometry
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_within(name: str, package: str) -> bool:
    """``a.b`` and ``a.b.c`` are within ``a.b``; ``a.bc`` is not."""
    return f"{name}.".startswith(f"{package}.")


def modules() -> list[Module]:
    """All Python source of ours but tests; scripts are found by their first line too."""
    found = []
    for top in (*OURS, "scripts"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix == ".py" or (top == "scripts" and is_python_script(path)):
                parts = path.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found.append(Module(name, path, ast.parse(path.read_bytes(), str(path))))
    return found


def is_python_script(path: Path) -> bool:
    """A file without suffix that starts with a Python interpreter line."""
    if path.suffix or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(100)
    return first.startswith(b"#!") and b"python" in first


MODULES = modules()


def complaints(module: Module) -> Iterator[str]:
    """Imports of one module that its room does not allow."""
    room = module.room
    for line, name in module.imports():
        place = f"{module.path.relative_to(ROOT)}:{line}"
        if name.split(".")[0] in room.never:
            yield f"{place}: {room.name} must not import {name}"
        is_ours = name.split(".")[0] in (*OURS, "tests", "scripts")
        if is_ours and not any(is_within(name, allowed) for allowed in (room.name, *room.may)):
            yield f"{place}: {room.name} must not import {name}"


def test_there_is_something_to_look_at() -> None:
    """A wrong path would make the other tests pass on nothing."""
    assert {"uffd", "guestmem", "migration"} <= {module.name.split(".")[0] for module in MODULES}


def test_imports_point_down() -> None:
    """See ROOMS: who may know whom."""
    found = [complaint for module in MODULES for complaint in complaints(module)]
    assert not found, "\n".join(found)


def test_page_size_stands_in_one_place() -> None:
    """4096, decimal or not, only in geometry: everyone else has a name for what they mean.

    A limit that happens to be 4 KiB says so (``4 << 10``); a flag bit is ``1 << 12``.
    """
    found = [
        f"{module.path.relative_to(ROOT)}:{node.lineno}"
        for module in MODULES
        if module.name != PAGE_SIZE_HOME
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and is_page_size(node)
    ]
    assert not found, "bare page size:\n" + "\n".join(found)


def is_page_size(node: ast.Constant) -> bool:
    """``4096`` or ``0x1000``."""
    return type(node.value) is int and node.value == PAGE_SIZE


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("uffd.x", "import guestmem", "uffd must not import guestmem"),
        ("guestmem.x", "from migration import wire", "guestmem must not import migration.wire"),
        ("guestmem.geometry", "import mmap", "guestmem.geometry must not import mmap"),
        ("migration.wire.x", "import socket", "migration.wire must not import socket"),
        ("migration.wire.x", "from ..engine import a", "must not import migration.engine.a"),
        ("migration.wire.x", "from guestmem import RAMBlock", "must not import guestmem.RAMBlock"),
        ("migration.runtime.x", "from ..toyvm import y", "must not import migration.toyvm.y"),
        ("migration.toyvm.x", "from ..runtime import service", "runtime.service"),
        ("scripts.x", "import migration.wire", "scripts must not import migration.wire"),
        ("migration.commands.x", "import tests.support", "must not import tests.support"),
    ],
)
def test_a_wrong_arrow_is_found(name: str, source: str, expected: str) -> None:
    """The test can fail."""
    module = Module(name, ROOT / f"{name.replace('.', '/')}.py", ast.parse(source))
    assert [line for line in complaints(module) if expected in line]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("guestmem.x", "from uffd import features"),
        ("migration.wire.x", "from guestmem.geometry import TARGET_PAGE_BYTES"),
        ("migration.wire.x", "from guestmem import geometry"),
        ("migration.engine.x", "from ..wire.errors import StreamError"),
        ("migration.toyvm.x", "from migration.runtime.machine import Machine"),
        ("migration.commands.x", "from migration.monitor import server"),
    ],
)
def test_a_right_arrow_is_not(name: str, source: str) -> None:
    """Neither absolute nor relative."""
    module = Module(name, ROOT / f"{name.replace('.', '/')}.py", ast.parse(source))
    assert not list(complaints(module))


@pytest.mark.parametrize("source", ["4096", "0x1000", "x % 4096"])
def test_each_spelling_of_the_page_size_is_found(source: str) -> None:
    """Also inside an expression."""
    constants = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    assert any(is_page_size(node) for node in constants)
