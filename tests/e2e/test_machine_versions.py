"""Two machine versions, and a program that knows only the older one, in live migrations.

Forward: what the older program sent, the newer takes, with the defaults its ``pre_load`` sets.
Backward: the newer program's ``toy-1.0`` sends what the older one knows; told to send more, it is
refused by the name of what is too much, and its guest runs on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from migration.toyvm import ToyMachine, ToyOptions
from migration.toyvm.devices.disk import DEFAULT_LABEL
from migration.toyvm.options import OptionError
from migration.wire.compat import CompatProperty
from tests.support.older_program import older_side
from tests.support.pair import MIB, Side, side
from tests.support.toyvm_machines import run_some, save_devices

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

SHAPE: dict[str, Any] = {"ram_bytes": 8 * MIB, "smp": 2, "rate": 20_000, "disk_bytes": MIB}
LATER = ("toy-cpu/clock", "toy-disk-state/label")
SWITCHES = ("toy-cpu.x-clock", "toy-disk-state.x-label")


def newer_side(**options: Any) -> AbstractContextManager[Side]:
    """This program, as ``toy-1.0`` unless said otherwise."""
    return side(**{**SHAPE, "machine_type": "toy-1.0", **options})


def older(**options: Any) -> AbstractContextManager[Side]:
    return older_side(**{**SHAPE, **options})


def settings(value: str, *switches: str) -> tuple[CompatProperty, ...]:
    return tuple(CompatProperty.parse(f"{switch}={value}") for switch in switches)


def move(source: Side, target: Side, path: Path, *, postcopy: bool) -> None:
    """A live migration to its end, whatever that is."""
    for each in (source, target):
        each.service.set_capabilities({"postcopy-ram": postcopy})
    uri = target.service.migrate_incoming(f"unix:{path}")
    source.service.migrate(uri)
    if postcopy:
        source.service.start_postcopy()
    source.service.wait(60)
    target.service.wait(60)


def label(one: Side) -> str:
    assert one.machine.devices.disk is not None
    return one.machine.devices.disk.label


def set_label(one: Side, text: str) -> None:
    assert one.machine.devices.disk is not None
    one.machine.devices.disk.label = text


@pytest.mark.parametrize("postcopy", [False, True])
def test_forward_and_backward(tmp_path: Path, postcopy: bool) -> None:
    """The guest goes from the older program to the newer and back, and everything is there."""
    with older() as first, newer_side(incoming=True) as second, older(incoming=True) as third:
        set_label(second, "left over")
        first.service.cont()
        move(first, second, tmp_path / "1", postcopy=postcopy)
        assert second.statuses[-1] == "completed", second.service.query()
        # What toy-1.0 does not send is what pre_load says, not what happened to be here.
        assert label(second) == DEFAULT_LABEL
        assert second.machine.downtime_ns() is None
        move(second, third, tmp_path / "2", postcopy=postcopy)
        assert third.statuses[-1] == "completed", third.service.query()
        run_after = third.machine.vcpu_statistics()
        assert all(each.ops > 0 for each in run_after)
        third.assert_sweep_clean()


@pytest.mark.parametrize("postcopy", [False, True])
@pytest.mark.parametrize(("switch", "name"), list(zip(SWITCHES, LATER, strict=True)))
def test_a_subsection_the_older_program_does_not_know(
    tmp_path: Path, postcopy: bool, switch: str, name: str
) -> None:
    """toy-1.0 told to send it all the same: refused by name; the guest runs on and then goes."""
    parent = name.partition("/")[0]
    with newer_side(global_properties=settings("on", switch)) as source:
        run_some(source.machine, 10)  # a vCPU that never ran has no clock to send
        source.service.cont()
        with older(incoming=True) as target:
            move(source, target, tmp_path / "no", postcopy=postcopy)
            assert target.statuses[-1] == "failed"
            error = str(target.service.query()["error-desc"])
            assert f"unknown subsection '{name}' of '{parent}'" in error
            assert target.machine.run_state == "inmigrate"
        assert source.statuses[-1] == "failed"
        assert source.machine.run_state == "running"
        with newer_side(incoming=True) as other:
            move(source, other, tmp_path / "yes", postcopy=postcopy)
            assert other.statuses[-1] == "completed"
            other.assert_sweep_clean()


@pytest.mark.parametrize("postcopy", [False, True])
def test_between_two_of_the_newest(tmp_path: Path, postcopy: bool) -> None:
    """toy-1.1 sends both: the label arrives, the downtime is measured."""
    newest = {"machine_type": "toy-1.1"}
    with newer_side(**newest) as source, newer_side(incoming=True, **newest) as target:
        set_label(source, "carried")
        source.service.cont()
        run_some(source.machine, 10)
        source.service.cont()
        move(source, target, tmp_path / "m", postcopy=postcopy)
        assert target.statuses[-1] == "completed", target.service.query()
        assert label(target) == "carried"
        run_until_it_did_something(target)
        assert target.machine.downtime_ns() is not None
        target.assert_sweep_clean()


def run_until_it_did_something(one: Side) -> None:
    """The guest arrived running; stopped and run a little further, every vCPU has done a touch."""
    one.service.stop_guest()
    run_some(one.machine, 1)


def test_the_newest_machine_can_be_told_to_send_the_older_stream() -> None:
    """``-global`` undoes what toy-1.1 added: byte for byte the sections of a toy-1.0."""
    told = ToyOptions(**SHAPE, global_properties=settings("off", *SWITCHES))
    with ToyMachine(told) as newest:
        run_some(newest, 10)
        data = save_devices(newest)
        assert not any(name.encode() in data for name in LATER)
        switch_on(newest)
        assert all(name.encode() in save_devices(newest) for name in LATER)
        switch_on(newest, False)
        assert save_devices(newest) == data


def switch_on(machine: ToyMachine, value: bool = True) -> None:
    for cpu in machine.devices.cpus:
        cpu.sends_clock = value
    assert machine.devices.disk is not None
    machine.devices.disk.sends_label = value


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("toy-cpu.x-nonsense=on", "toy-cpu has no property 'x-nonsense'"),
        ("toy-cpu.x-clock=perhaps", "'perhaps' is neither on nor off"),
        ("e1000.mac=1", r"no such device \(with properties: toy-cpu, toy-disk-state\)"),
    ],
)
def test_wrong_properties_are_refused(text: str, match: str) -> None:
    options = ToyOptions(**SHAPE, global_properties=(CompatProperty.parse(text),))
    with pytest.raises(OptionError, match=match), ToyMachine(options):
        pass
