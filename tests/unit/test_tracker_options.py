"""Options that choose the dirty tracker: what fits together and what is refused, in words."""

from __future__ import annotations

import argparse

import pytest

from guestmem import RAMList
from migration.commands.vm_options import TRACKERS, add_shape_options, shape_arguments
from migration.toyvm import OptionError, ToyOptions, TrackerChoice, VCpuKind
from migration.toyvm.tracking import choose_tracker


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_shape_options(parser, ram="64M")
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "vcpu", "size"),
    [
        ((), "thread", 0),
        (("-accel", "kvm"), "kvm", 0),
        (("-accel", "kvm,dirty-ring-size=4096"), "kvm", 4096),
        (("--accel", "accel=kvm,dirty-ring-size=1024"), "kvm", 1024),
        (("--vcpu", "kvm", "--accel", "thread"), "thread", 0),
    ],
)
def test_qemus_accel_spelling(words: tuple[str, ...], vcpu: str, size: int) -> None:
    args = parsed(*words)
    assert (args.vcpu, args.dirty_ring_size) == (vcpu, size)
    again = parsed(*shape_arguments(args))  # as a child process of `demo` gets them
    assert (again.vcpu, again.dirty_ring_size) == (vcpu, size)
    assert again.dirty_tracker == "auto"


@pytest.mark.parametrize(
    "text", ["tcg", "kvm,dirty-ring-size=", "kvm,dirty-ring-size=x", "kvm,x=1"]
)
def test_an_accelerator_we_do_not_have_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentError):
        parsed("--accel", text)


def test_the_command_line_has_every_tracker() -> None:
    assert tuple(choice.value for choice in TrackerChoice) == TRACKERS


@pytest.mark.parametrize("size", [1, 512, 1000, 3 << 10, 1 << 17])
def test_a_ring_has_a_size_kvm_takes(size: int) -> None:
    with pytest.raises(OptionError, match="power of two from 1024 to 65536"):
        ToyOptions(vcpu=VCpuKind.KVM, dirty_ring_size=size)


def test_combinations_that_cannot_work_are_refused() -> None:
    with pytest.raises(OptionError, match="vcpu=kvm"):
        ToyOptions(dirty_ring_size=1024)
    with pytest.raises(OptionError, match="KVM vCPUs only"):
        ToyOptions(dirty_tracker=TrackerChoice.KVM_RING)
    with pytest.raises(OptionError, match="no dirty log"):
        ToyOptions(vcpu=VCpuKind.KVM, dirty_ring_size=1024, dirty_tracker=TrackerChoice.KVM_LOG)
    with pytest.raises(OptionError, match="KVM vCPUs only"):
        choose_tracker(TrackerChoice.KVM_LOG, RAMList([]), None)


def test_asking_for_the_ring_makes_one() -> None:
    options = ToyOptions(vcpu=VCpuKind.KVM, dirty_tracker=TrackerChoice.KVM_RING)
    assert options.ring_entries == 4096
    assert ToyOptions(vcpu=VCpuKind.KVM).ring_entries == 0
