"""Options that say what guest RAM is made of: ``--backing``, ``--mem-path``, ``--object``.

``--object`` takes QEMU's memory backends, its spelling and its rules. Each is a RAM block of its
own; the one named by ``--memory-backend`` (QEMU: ``-machine memory-backend=ID``) is the main one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migration.monitor.units import parse_size, parse_switch

if TYPE_CHECKING:
    from guestmem import MemoryBackend, NumaPolicy

BACKINGS = ("anon", "memfd", "hugetlb")
TYPES = ("memory-backend-ram", "memory-backend-memfd", "memory-backend-file")
_KEYS = frozenset(
    {"id", "size", "prealloc", "prealloc-threads", "host-nodes", "policy", "reserve", "share"}
)
_TYPE_KEYS = {
    "memory-backend-ram": frozenset[str](),
    "memory-backend-memfd": frozenset({"hugetlb", "hugetlbsize"}),
    "memory-backend-file": frozenset({"mem-path", "x-page-size"}),
}


@dataclass(frozen=True)
class MemoryObject:
    """One ``--object``, taken apart and checked. :ivar text: as the user wrote it."""

    id: str
    size: int
    backend: MemoryBackend
    text: str


def add_memory_options(group: argparse._ArgumentGroup) -> None:
    """Declare them; each side of a migration may have its own."""
    group.add_argument(
        "--backing",
        choices=BACKINGS,
        default="anon",
        help="guest RAM: anonymous memory, a memfd, or huge pages (default anon)",
    )
    group.add_argument(
        "--hugepage-size",
        type=_size,
        metavar="SIZE",
        help="page size of --backing hugetlb (default 2M); with --mem-path, insist on it",
    )
    group.add_argument(
        "--mem-path",
        "-mem-path",
        metavar="PATH",
        help="guest RAM in a file at PATH, or a nameless one if PATH is a directory; "
        "a mounted hugetlbfs gives huge pages",
    )
    group.add_argument(
        "--mem-prealloc",
        "-mem-prealloc",
        action="store_true",
        help="make all of RAM exist at the start, one thread a vCPU: a lack of it shows then",
    )
    group.add_argument(
        "--object",
        "-object",
        dest="objects",
        action="append",
        default=[],
        metavar="TYPE,id=ID,size=SIZE[,...]",
        help="one more RAM block: TYPE is memory-backend-ram, -memfd (hugetlb=on, hugetlbsize=2M) "
        "or -file (mem-path=); prealloc=on, prealloc-threads=N, reserve=off, host-nodes=0-1, "
        "policy=bind|interleave|preferred",
    )
    group.add_argument(
        "--memory-backend",
        metavar="ID",
        help="that object is the main RAM, of the size -m says",
    )


def memory_arguments(args: argparse.Namespace) -> list[str]:
    """The same options as words, for a child process."""
    words = ["--backing", args.backing]
    if args.hugepage_size is not None:
        words += ["--hugepage-size", f"{args.hugepage_size}B"]
    if args.mem_path is not None:
        words += ["--mem-path", args.mem_path]
    if args.mem_prealloc:
        words += ["--mem-prealloc"]
    for text in args.objects:
        words += ["--object", text]
    if args.memory_backend is not None:
        words += ["--memory-backend", args.memory_backend]
    return words


@dataclass(frozen=True)
class MemoryPlan:
    """The blocks beside the main one, and what each block's memory is.

    :ivar backends: by idstr; the main block's under the name given.
    """

    extra_blocks: tuple[tuple[str, int], ...]
    backends: dict[str, MemoryBackend]


def memory_plan(args: argparse.Namespace, main: str) -> MemoryPlan:
    """What the options ask for. :param main: idstr of the main block.

    :raises UserError: they contradict each other, or an object is not one.
    """
    from guestmem import Backing, MemoryBackend

    from .output import UserError

    threads = max(1, args.smp) if args.mem_prealloc else 0
    try:
        objects = [parse_object(text) for text in args.objects]
        kind = Backing.FILE if args.mem_path else Backing[args.backing.upper()]
        common = MemoryBackend(kind, args.mem_path, args.hugepage_size, prealloc_threads=threads)
    except ValueError as error:
        raise UserError(str(error)) from None
    backends, extra = {main: common}, []
    for each in objects:
        if each.id != args.memory_backend:
            backends[each.id] = each.backend
            extra.append((each.id, each.size))
            continue
        if each.size != args.ram_bytes:
            raise UserError(
                f"object {each.id!r} has {each.size} bytes and -m says {args.ram_bytes}",
                hint=f"-m {each.size}B",
            )
        backends[main] = each.backend
    names = [each.id for each in objects]
    if args.memory_backend is not None and args.memory_backend not in names:
        raise UserError(
            f"--memory-backend {args.memory_backend}: there is no such object",
            hint=f"--object memory-backend-ram,id={args.memory_backend},size=...",
        )
    if len(set(names)) < len(names):
        raise UserError("two objects have one id")
    return MemoryPlan(tuple(extra), backends)


def parse_object(text: str) -> MemoryObject:
    """One ``--object``.

    :raises ValueError: not a memory backend, or an option of it that is unknown or contradicts.
    """
    kind, _, rest = text.partition(",")
    if kind not in TYPES:
        raise ValueError(f"--object {text}: the type is one of {', '.join(TYPES)}")
    given = _options(text, rest)
    if unknown := sorted(given.keys() - _KEYS - _TYPE_KEYS[kind]):
        known = ", ".join(sorted(_KEYS | _TYPE_KEYS[kind]))
        raise ValueError(f"--object {text}: {kind} has no option {unknown[0]!r} (it has: {known})")
    for name in ("id", "size", *(("mem-path",) if kind == "memory-backend-file" else ())):
        if not given.get(name):
            raise ValueError(f"--object {text}: {name}= is missing")
    try:
        backend = _backend(kind, given)
        return MemoryObject(given["id"], parse_size(given["size"]), backend, text)
    except ValueError as error:
        raise ValueError(f"--object {text}: {error}") from None


def _options(text: str, rest: str) -> dict[str, str]:
    given: dict[str, str] = {}
    # QEMU doubles a comma that belongs to a value.
    for part in rest.replace(",,", "\0").split(",") if rest else ():
        name, equals, value = part.replace("\0", ",").partition("=")
        # QEMU numbers the members of a list, too.
        name = "host-nodes" if name.startswith("host-nodes.") else name
        if not equals:
            raise ValueError(f"--object {text}: write {name}=VALUE")
        if name == "host-nodes" and name in given:
            value = f"{given[name]},{value}"
        elif name in given:
            raise ValueError(f"--object {text}: {name}= is there twice")
        given[name] = value
    return given


def _backend(kind: str, given: dict[str, str]) -> MemoryBackend:
    from guestmem import Backing, MemoryBackend

    hugetlb = parse_switch(given.get("hugetlb", "off"))
    if "hugetlbsize" in given and not hugetlb:
        raise ValueError("hugetlbsize goes with hugetlb=on")
    _check_share(kind, given)
    size = given.get("hugetlbsize", given.get("x-page-size"))
    backing = {
        "memory-backend-ram": Backing.ANON,
        "memory-backend-memfd": Backing.HUGETLB if hugetlb else Backing.MEMFD,
        "memory-backend-file": Backing.FILE,
    }[kind]
    threads = int(given.get("prealloc-threads", "1"))
    return MemoryBackend(
        backing,
        path=given.get("mem-path"),
        hugepage_size=None if size is None else parse_size(size),
        is_reserved=parse_switch(given.get("reserve", "on")),
        policy=_policy(given),
        prealloc_threads=threads if parse_switch(given.get("prealloc", "off")) else 0,
    )


def _check_share(kind: str, given: dict[str, str]) -> None:
    """Accepted only where it says what is the case anyway."""
    is_shared = kind != "memory-backend-ram"
    if "share" in given and parse_switch(given["share"]) != is_shared:
        is_word = "shared" if is_shared else "private"
        raise ValueError(f"share={given['share']}: {kind} is always {is_word} here")


def _policy(given: dict[str, str]) -> NumaPolicy | None:
    from guestmem import NumaPolicy, PolicyMode
    from guestmem.numa import parse_nodes

    if "policy" not in given and "host-nodes" not in given:
        return None
    name = given.get("policy", "default")
    if name not in [mode.value for mode in PolicyMode]:
        raise ValueError(f"policy={name}: one of default, preferred, bind, interleave")
    nodes = parse_nodes(given["host-nodes"]) if "host-nodes" in given else ()
    return NumaPolicy(PolicyMode(name), nodes)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
