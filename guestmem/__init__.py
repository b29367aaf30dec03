"""Guest RAM: geometry and bitmaps, mappings and RAMBlocks, dirty tracking.

Knows the kernel's memory calls (through the room below, ``uffd``) and nothing of migrations.
"""

from guestmem.backends import MemoryBackend
from guestmem.backings import Backing
from guestmem.bitmap import Bitmap
from guestmem.collapse import Collapser, CollapseReport, CollapseState
from guestmem.dirty import DirtyTracker, TrackerKind
from guestmem.errors import (
    DirtyTrackingError,
    GuestMemoryError,
    GuestMemoryLost,
    HugepagesShort,
    PageSizeMismatch,
    TrackingBusy,
)
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, TARGET_PAGE_MASK
from guestmem.kvmringtracker import KvmRingTracker
from guestmem.kvmslot import KvmSlot
from guestmem.kvmtracker import KvmLogTracker
from guestmem.mapping import Mapping
from guestmem.numa import NumaPolicy, PolicyMode
from guestmem.prealloc import preallocate
from guestmem.ramblock import RAMBlock
from guestmem.ramlist import RAMList
from guestmem.smaps import MappingReport
from guestmem.wpsynctracker import WpSyncTracker
from guestmem.wptracker import WpAsyncTracker

__all__ = [
    "TARGET_PAGE_BITS",
    "TARGET_PAGE_BYTES",
    "TARGET_PAGE_MASK",
    "Backing",
    "Bitmap",
    "CollapseReport",
    "CollapseState",
    "Collapser",
    "DirtyTracker",
    "DirtyTrackingError",
    "GuestMemoryError",
    "GuestMemoryLost",
    "HugepagesShort",
    "KvmLogTracker",
    "KvmRingTracker",
    "KvmSlot",
    "Mapping",
    "MappingReport",
    "MemoryBackend",
    "NumaPolicy",
    "PageSizeMismatch",
    "PolicyMode",
    "RAMBlock",
    "RAMList",
    "TrackerKind",
    "TrackingBusy",
    "WpAsyncTracker",
    "WpSyncTracker",
    "preallocate",
]
