"""Whether KVM vCPUs can be had here."""

from __future__ import annotations

import os

from tests.support.need import need


def need_kvm() -> None:
    """Skip without /dev/kvm; nothing a test can install provides it."""
    need(os.path.exists("/dev/kvm"), "no /dev/kvm: this host has no virtualisation to offer")
    need(
        os.access("/dev/kvm", os.R_OK | os.W_OK),
        "/dev/kvm is not open to this user",
        remedy="run the tests as root, or in the group kvm",
    )
