"""Accesses that end in a signal: the SIGBUS feature, poison, guard regions."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from tests.support.need import need
from tests.support.uffd_memory import (
    MEMORY_TYPES,
    PAGE,
    memory,
    need_feature,
    open_uffd,
    pattern,
)
from uffd import Advice, Feature, InvalidRequest, Mapping, Mode, touch
from uffd.touch import AccessFault, Resolver, guarded_accesses, guarded_load, guarded_store

pytestmark = pytest.mark.kernel

every_memory = pytest.mark.parametrize("region", MEMORY_TYPES, indirect=True)

BUS_ADRERR, BUS_MCEERR_AR, SEGV_MAPERR = 2, 4, 1


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Mapping]:
    with memory(getattr(request, "param", "anon")) as mapping:
        yield mapping


@every_memory
def test_sigbus_mode_names_the_byte_and_sends_no_message(region: Mapping) -> None:
    with open_uffd(Feature.SIGBUS) as uffd, guarded_accesses():
        uffd.register(region)
        with pytest.raises(AccessFault) as caught:
            guarded_load(region.address + 123)
        fault = caught.value
        assert (fault.signal, fault.code) == (signal.SIGBUS, BUS_ADRERR)
        assert fault.address == region.address + 123
        assert uffd.read_events() == []


@every_memory
def test_sigbus_mode_resolved_inside_the_handler(region: Mapping) -> None:
    with memory("anon", region.page_size // PAGE) as page, open_uffd(Feature.SIGBUS) as uffd:
        page.write(0, pattern(region))
        uffd.register(region)
        resolver = Resolver(uffd.fileno(), region.page_size, page.address)
        with guarded_accesses():
            for index in range(region.page_count):
                assert guarded_load(region.page(index), resolver) == (1, 1)
                assert guarded_store(region.page(index), 9, resolver) == 0
        assert region.load(region.page_size) == 9
        assert uffd.read_events() == []


def test_sigbus_mode_write_protect_faults_are_signals_too(region: Mapping) -> None:
    region.write(0, pattern(region))
    with open_uffd(Feature.SIGBUS) as uffd, guarded_accesses():
        uffd.register(region, Mode.WP)
        uffd.write_protect(region)
        with pytest.raises(AccessFault):
            guarded_store(region.address, 5)
        assert guarded_load(region.address) == (1, 0)
        uffd.write_unprotect(region)
        assert guarded_store(region.address, 5) == 0


def test_a_resolver_that_cannot_place_reports_why(region: Mapping) -> None:
    with open_uffd(Feature.SIGBUS) as uffd, guarded_accesses():
        uffd.register(region)
        with pytest.raises(AccessFault) as caught:
            guarded_load(region.address, Resolver(uffd.fileno(), PAGE, 0x1000))
        assert caught.value.copy_errno == errno.EFAULT


def test_system_calls_get_efault_in_sigbus_mode(region: Mapping) -> None:
    read_end, write_end = os.pipe()
    try:
        with open_uffd(Feature.SIGBUS) as uffd:
            uffd.register(region)
            with pytest.raises(OSError, match="Bad address"):
                os.write(write_end, region.unsafe_view())
    finally:
        os.close(read_end)
        os.close(write_end)


@every_memory
def test_poison_is_a_signal_until_it_is_cured(region: Mapping) -> None:
    with open_uffd() as uffd, guarded_accesses():
        uffd.register(region)
        need_feature(Feature.POISON)
        uffd.poison(region.address, region.page_size)
        with pytest.raises(AccessFault) as caught:
            guarded_load(region.address)
        assert caught.value.signal == signal.SIGBUS
        assert caught.value.code in (BUS_ADRERR, BUS_MCEERR_AR)
        uffd.copy(region.address, pattern(region))
        assert guarded_load(region.address) == (1, 0)


def test_a_guard_region_is_a_segmentation_fault(region: Mapping) -> None:
    try:
        region.advise(Advice.GUARD_INSTALL, 0, PAGE)
    except InvalidRequest:
        need(False, "no guard regions before Linux 6.13")
    with guarded_accesses(), pytest.raises(AccessFault) as caught:
        guarded_store(region.address, 1)
    assert (caught.value.signal, caught.value.code) == (signal.SIGSEGV, SEGV_MAPERR)
    region.advise(Advice.GUARD_REMOVE, 0, PAGE)
    assert touch.load(region.address) == 0


def test_signals_outside_a_guarded_access_end_the_process_as_before() -> None:
    body = """
        import signal
        from uffd import Feature, Mapping, Userfaultfd
        from uffd.touch import guarded_accesses
        with Mapping.anonymous(4096) as region, Userfaultfd.open(Feature.SIGBUS) as uffd:
            uffd.register(region)
            with guarded_accesses():
                region.load(0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], check=False, timeout=60)
    assert done.returncode == -signal.SIGBUS
