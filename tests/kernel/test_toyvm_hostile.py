"""Device state that was damaged on the way: refused with a typed error or harmless, never a crash,
and the guest can always be stopped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.toyvm import ToyMachine, ToyOptions, VCpuKind
from migration.wire.errors import RemoteStreamError
from tests.support.toyvm_kvm import need_kvm
from tests.support.toyvm_machines import copy_ram, load_devices, run_some, save_devices

pytestmark = pytest.mark.kernel

_RAM = 1 << 20


class _Pair:
    """A source's device state, and a destination to try versions of it on."""

    def __init__(self, kind: VCpuKind) -> None:
        shape = {"ram_bytes": _RAM, "vcpu": kind, "disk_bytes": 1 << 16, "window_pages": 2}
        with ToyMachine(ToyOptions(**shape)) as source:  # type: ignore[arg-type]
            run_some(source, 1000)
            self.data = save_devices(source)
            self.destination = ToyMachine(ToyOptions(**shape, incoming=True))  # type: ignore[arg-type]
            copy_ram(source, self.destination)
        self.ram = self.destination.ram.by_idstr("toy.ram")
        self.contents = self.ram.read(0, _RAM)

    def load(self, data: bytes) -> bool:
        """Whether it was accepted."""
        self.ram.write(0, self.contents)  # an accepted version may have run
        load_devices(self.destination, self.data)  # and of a refused one a part may be left
        refusal = ""
        try:
            load_devices(self.destination, data)
        except RemoteStreamError as error:
            refusal = str(error)
        assert not refusal or "at stream offset" in refusal
        return not refusal


@pytest.fixture(scope="module")
def threads() -> Iterator[_Pair]:
    pair = _Pair(VCpuKind.THREAD)
    yield pair
    pair.destination.close()


@pytest.fixture(scope="module")
def kvm() -> Iterator[_Pair]:
    need_kvm()
    pair = _Pair(VCpuKind.KVM)
    yield pair
    pair.destination.close()


@given(share=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_refused(threads: _Pair, share: float) -> None:
    assert not threads.load(threads.data[: int(len(threads.data) * share)])


@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_harmless(threads: _Pair, share: float, bit: int) -> None:
    data = bytearray(threads.data)
    data[int(len(data) * share)] ^= 1 << bit
    if threads.load(bytes(data)):
        threads.destination.start()
        threads.destination.stop()
        threads.destination.sweep()


@given(offset=st.integers(6, 6 + 144 + 312 + 128 + 392 + 64), bit=st.integers(0, 7))
def test_damaged_registers_are_refused_or_end_in_the_guest(
    kvm: _Pair, offset: int, bit: int
) -> None:
    """Whatever the registers say, the guest stays where it is and a stop comes back."""
    name = b"toy-cpu/kvm"
    data = bytearray(kvm.data)
    data[data.index(name) + len(name) + 4 + offset] ^= 1 << bit
    if kvm.load(bytes(data)):
        kvm.destination.start()
        kvm.destination.stop()
        kvm.destination.sweep()


def test_the_undamaged_state_still_loads_after_all_that(threads: _Pair) -> None:
    assert threads.load(threads.data)
