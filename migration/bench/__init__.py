"""What this machine can do at best, and how close the runtime comes.

``limits`` measures the machine natively (C, no interpreter lock), ``placement`` turns the wake-up
costs into a recommendation, ``runtime`` and ``qemu`` drive whole processes through QMP, ``compare``
sets one against the other. This room imports only the rooms below the runtime: what it says about
``postcopy run`` it learns the way any user would, from outside.
"""

from .placement import Placement, WakeCost, choose_placement
from .results import Cost, Latency, Measurement, Skipped, Throughput

__all__ = [
    "Cost",
    "Latency",
    "Measurement",
    "Placement",
    "Skipped",
    "Throughput",
    "WakeCost",
    "choose_placement",
]
