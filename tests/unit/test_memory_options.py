"""``--object`` and its neighbours: QEMU's spelling, and what contradicts is said."""

from __future__ import annotations

import argparse

import pytest

from guestmem import Backing, NumaPolicy, PolicyMode
from guestmem.numa import format_nodes, parse_nodes
from migration.commands.memory_options import (
    add_memory_options,
    memory_arguments,
    memory_plan,
    parse_object,
)
from migration.commands.output import UserError


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_memory_options(parser.add_argument_group("memory"))
    args = parser.parse_args(words)
    args.ram_bytes, args.smp = 64 << 20, 3
    return args


def test_everything_a_backend_can_have() -> None:
    one = parse_object(
        "memory-backend-memfd,id=a,size=64M,hugetlb=on,hugetlbsize=1G,prealloc=on,"
        "prealloc-threads=4,host-nodes=0-1,policy=interleave,reserve=off,share=on"
    )
    assert (one.id, one.size) == ("a", 64 << 20)
    backend = one.backend
    assert (backend.backing, backend.hugepage_size) == (Backing.HUGETLB, 1 << 30)
    assert backend.policy == NumaPolicy(PolicyMode.INTERLEAVE, (0, 1))
    assert (backend.prealloc_threads, backend.is_reserved) == (4, False)


@pytest.mark.parametrize(
    ("text", "backing"),
    [
        ("memory-backend-ram,id=a,size=1M", Backing.ANON),
        ("memory-backend-memfd,id=a,size=1M", Backing.MEMFD),
        ("memory-backend-memfd,id=a,size=1M,hugetlb=on", Backing.HUGETLB),
        ("memory-backend-file,id=a,size=1M,mem-path=/a,,b", Backing.FILE),
    ],
)
def test_the_kinds(text: str, backing: Backing) -> None:
    backend = parse_object(text).backend
    assert backend.backing is backing
    assert backend.prealloc_threads == 0
    assert backend.policy is None
    assert backend.path == ("/a,b" if backing is Backing.FILE else None)


def test_nodes_as_qemu_numbers_them() -> None:
    one = parse_object("memory-backend-ram,id=a,size=1M,host-nodes.0=0,host-nodes.1=2,policy=bind")
    assert one.backend.policy == NumaPolicy(PolicyMode.BIND, (0, 2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rng-random,id=a", "the type is one of"),
        ("memory-backend-ram,size=1M", "id= is missing"),
        ("memory-backend-ram,id=a", "size= is missing"),
        ("memory-backend-file,id=a,size=1M", "mem-path= is missing"),
        ("memory-backend-ram,id=a,size=1M,hugetlb=on", "no option 'hugetlb'"),
        ("memory-backend-memfd,id=a,size=1M,hugetlbsize=2M", "goes with hugetlb=on"),
        ("memory-backend-ram,id=a,size=1M,policy=bind", "at least one"),
        ("memory-backend-ram,id=a,size=1M,host-nodes=0", "'default' takes none"),
        ("memory-backend-ram,id=a,size=1M,policy=local,host-nodes=0", "one of default"),
        ("memory-backend-ram,id=a,size=1M,host-nodes=1-0,policy=bind", "not a list of nodes"),
        ("memory-backend-ram,id=a,size=1M,share=on", "always private"),
        ("memory-backend-memfd,id=a,size=1M,share=off", "always shared"),
        ("memory-backend-ram,id=a,size=1M,id=b", "twice"),
        ("memory-backend-ram,id=a,size=lots", "not a size"),
        ("memory-backend-ram,id=a,size=1M,prealloc=on,prealloc-threads=99", "1 to 64"),
        ("memory-backend-ram,id=a,size", "write size=VALUE"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_object(text)
    assert text in str(caught.value)


def test_objects_are_blocks_and_one_is_the_main_one() -> None:
    args = parsed(
        *("--object", "memory-backend-memfd,id=a,size=64M"),
        *("--object", "memory-backend-ram,id=b,size=1M"),
        *("--memory-backend", "a"),
    )
    plan = memory_plan(args, "toy.ram")
    assert plan.extra_blocks == (("b", 1 << 20),)
    assert plan.backends["toy.ram"].backing is Backing.MEMFD
    assert plan.backends["b"].backing is Backing.ANON


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory-backend", "a"], "no such object"),
        (
            ["--object", "memory-backend-ram,id=a,size=1M", "--memory-backend", "a"],
            "1048576 bytes and -m says 67108864",
        ),
        (["--object", "memory-backend-ram,id=a,size=1M"] * 2, "two objects have one id"),
        (["--object", "memory-backend-ram,id=a"], "size= is missing"),
    ],
)
def test_plans_that_contradict(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        memory_plan(parsed(*words), "toy.ram")


def test_a_child_gets_the_same_options() -> None:
    words = ["--hugepage-size", "2M", "--mem-path", "/x", "--mem-prealloc", "--memory-backend"]
    args = parsed(*words, "a", "--object", "memory-backend-ram,id=a,size=64M")
    again = parsed(*memory_arguments(args))
    assert memory_arguments(again) == memory_arguments(args)
    assert memory_plan(again, "m") == memory_plan(args, "m")


def test_prealloc_of_the_main_block_takes_a_thread_a_vcpu() -> None:
    plan = memory_plan(parsed("--mem-prealloc"), "toy.ram")
    assert plan.backends["toy.ram"].prealloc_threads == 3


@pytest.mark.parametrize("nodes", [(0,), (0, 1), (0, 2, 3), (1, 3, 5, 6, 7)])
def test_lists_of_nodes(nodes: tuple[int, ...]) -> None:
    assert parse_nodes(format_nodes(nodes)) == nodes
