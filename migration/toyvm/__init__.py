"""The toy guest: vCPUs (threads or KVM), devices, workloads, and the oracle that judges its
memory."""

from .histogram import Latency
from .machine import ToyMachine
from .options import (
    MACHINE_TYPES,
    OptionError,
    ToyOptions,
    TrackerChoice,
    VCpuKind,
    Workload,
)
from .oracle import BadPage, Damage, SweepReport
from .runstate import RunState, RunStateError

__all__ = [
    "MACHINE_TYPES",
    "BadPage",
    "Damage",
    "Latency",
    "OptionError",
    "RunState",
    "RunStateError",
    "SweepReport",
    "ToyMachine",
    "ToyOptions",
    "TrackerChoice",
    "VCpuKind",
    "Workload",
]
