"""The kernel's userfaultfd interface, complete, and nothing else.

    from uffd import FaultHandler, Feature, Mapping, Mode, Served, Userfaultfd, ZeroSource

    with Mapping.anonymous(1 << 20) as region, Userfaultfd.open(Feature.THREAD_ID) as uffd:
        uffd.register(region, Mode.MISSING)
        with FaultHandler(uffd, [Served(region, ZeroSource())]) as handler:
            region.read(0, region.length)          # served by native code, no interpreter lock
            print(handler.statistics().missing)

Rooms above import from here; this one imports only the standard library and its own C core.
"""

from uffd.advice import Advice, madvise, process_madvise
from uffd.errors import (
    BadAddress,
    FeatureUnsupported,
    HugepagePoolEmpty,
    InvalidRequest,
    LayoutChanging,
    NotPermitted,
    OutOfMemory,
    PageAlreadyPresent,
    PageShared,
    ProcessGone,
    RangeNotRegistered,
    RangeOwnedElsewhere,
    UffdError,
)
from uffd.events import Event, Fork, PageFault, Remap, Remove, UnknownEvent, Unmap
from uffd.fd import QueueDepth, Userfaultfd, enabled_features
from uffd.files import MemfdFlag, Seal, file_system, memfd_create, punch_hole
from uffd.flags import FaultFlag, Feature, Ioctls, Mode
from uffd.handler import FaultHandler, FaultStatistics
from uffd.mapping import Mapping
from uffd.opening import KernelSupport, Opening, Refusal, Way, kernel_support
from uffd.operations import MemoryRange, Registration
from uffd.pages import (
    Category,
    MappingFlag,
    MappingInfo,
    Pagemap,
    PagemapEntry,
    PageRegion,
    ScanFlag,
    ScanResult,
    is_resident,
    mincore,
    query_mapping,
)
from uffd.pending import Outstanding, PendingFaults
from uffd.processes import pidfd_getfd, pidfd_open
from uffd.sources import (
    BufferSource,
    CallableSource,
    FileSource,
    PageCacheSource,
    PageSource,
    Served,
    ZeroSource,
)
from uffd.watchdog import Watch, Watchdog

__all__ = [
    "Advice",
    "BadAddress",
    "BufferSource",
    "CallableSource",
    "Category",
    "Event",
    "FaultFlag",
    "FaultHandler",
    "FaultStatistics",
    "Feature",
    "FeatureUnsupported",
    "FileSource",
    "Fork",
    "HugepagePoolEmpty",
    "InvalidRequest",
    "Ioctls",
    "KernelSupport",
    "LayoutChanging",
    "Mapping",
    "MappingFlag",
    "MappingInfo",
    "MemfdFlag",
    "MemoryRange",
    "Mode",
    "NotPermitted",
    "Opening",
    "OutOfMemory",
    "Outstanding",
    "PageAlreadyPresent",
    "PageCacheSource",
    "PageFault",
    "PageRegion",
    "PageShared",
    "PageSource",
    "Pagemap",
    "PagemapEntry",
    "PendingFaults",
    "ProcessGone",
    "QueueDepth",
    "RangeNotRegistered",
    "RangeOwnedElsewhere",
    "Refusal",
    "Registration",
    "Remap",
    "Remove",
    "ScanFlag",
    "ScanResult",
    "Seal",
    "Served",
    "UffdError",
    "UnknownEvent",
    "Unmap",
    "Userfaultfd",
    "Watch",
    "Watchdog",
    "Way",
    "ZeroSource",
    "enabled_features",
    "file_system",
    "is_resident",
    "kernel_support",
    "madvise",
    "memfd_create",
    "mincore",
    "pidfd_getfd",
    "pidfd_open",
    "process_madvise",
    "punch_hole",
    "query_mapping",
]
