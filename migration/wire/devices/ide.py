"""An IDE drive: ``ide_drive``, version 3, which QEMU nests into its controllers' sections.

The drive's transfer state is only sent while a PIO transfer runs (DRQ set, or one waits to be
retried): subsection ``ide_drive/pio_state``. It cannot send the function to call at the end of
the transfer, so it sends its index in a table that never changes.

Source: QEMU ``hw/ide/core.c``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..vmstate import I32, U8, U32, Bool, Buffer, VArray, VMStateDescription

IO_BUFFER_BYTES = 256 * 512 + 4
"""Bytes of a drive's I/O buffer: 256 sectors and 4 bytes of slack. All of it is sent."""

IDENTIFY_BYTES = 512
STATUS_DRQ = 0x08
ERROR_STATUS_RETRY_PIO = 0x10

TRANSFER_ENDS = (
    "sector-read",
    "sector-write",
    "transfer-stop",
    "atapi-cmd-reply-end",
    "atapi-cmd",
    "dummy-transfer-stop",
)
"""What happens when the data of a PIO transfer has gone through; the index in here is what is
sent.
"""


@dataclass(slots=True)
class IdeBus:
    """The part of the bus a drive looks at."""

    error_status: int = 0


@dataclass(slots=True)
class IdeDrive:
    """One drive's registers and transfer state.

    :ivar identify_set: ``identify_data`` (512 bytes) holds the answer to IDENTIFY and is sent.
    :ivar data_start: offset in ``io_buffer`` of the next byte the guest reads or writes.
    :ivar data_end: offset behind the last one.
    :ivar end_transfer: one of :data:`TRANSFER_ENDS`.
    :ivar atapi_dma: the packet command in flight uses DMA.
    """

    mult_sectors: int = 16
    identify_set: int = 0
    identify_data: bytes = bytes(IDENTIFY_BYTES)
    feature: int = 0
    error: int = 1
    nsector: int = 1
    sector: int = 1
    lcyl: int = 0
    hcyl: int = 0
    hob_feature: int = 0
    hob_sector: int = 0
    hob_nsector: int = 0
    hob_lcyl: int = 0
    hob_hcyl: int = 0
    select: int = 0xA0
    status: int = 0x50
    lba48: int = 0
    sense_key: int = 0
    asc: int = 0
    cdrom_changed: int = 0
    tray_open: bool = False
    tray_locked: bool = False
    new_media: bool = False
    eject_request: bool = False
    bus: IdeBus = field(default_factory=IdeBus)
    req_nb_sectors: int = 0
    io_buffer: bytes | list[int] = bytes(IO_BUFFER_BYTES)
    data_start: int = 0
    data_end: int = 0
    end_transfer: str = "transfer-stop"
    elementary_transfer_size: int = 0
    packet_transfer_size: int = 0
    write_cache: bool = True
    atapi_dma: bool = False
    cur_io_buffer_offset: int = 0
    cur_io_buffer_len: int = 0
    end_transfer_fn_idx: int = 0

    @property
    def in_pio_transfer(self) -> bool:
        """A PIO transfer runs, or waits to be retried."""
        return bool(self.status & STATUS_DRQ or self.bus.error_status & ERROR_STATUS_RETRY_PIO)


def _post_load(drive: IdeDrive, version_id: int) -> None:
    if drive.identify_set:
        # Word 85 of the IDENTIFY data, bit 5: the guest has the write cache on.
        drive.write_cache = bool(drive.identify_data[170] & 0x20)


def _pio_pre_save(drive: IdeDrive) -> None:
    drive.cur_io_buffer_offset = drive.data_start
    drive.cur_io_buffer_len = drive.data_end - drive.data_start
    drive.end_transfer_fn_idx = TRANSFER_ENDS.index(drive.end_transfer)


def _pio_post_load(drive: IdeDrive, version_id: int) -> None:
    if drive.end_transfer_fn_idx >= len(TRANSFER_ENDS):
        raise ValueError(f"end_transfer_fn_idx {drive.end_transfer_fn_idx} means nothing")
    offset, length = drive.cur_io_buffer_offset, drive.cur_io_buffer_len
    if min(offset, length) < 0 or offset + length > IO_BUFFER_BYTES:
        raise ValueError(f"a transfer of {length} bytes at {offset} is outside the I/O buffer")
    drive.io_buffer = bytes(drive.io_buffer)
    drive.end_transfer = TRANSFER_ENDS[drive.end_transfer_fn_idx]
    drive.data_start = offset
    drive.data_end = offset + length
    drive.atapi_dma = bool(drive.feature & 1)


IDE_DRIVE_PIO_STATE = VMStateDescription(
    name="ide_drive/pio_state",
    version_id=1,
    minimum_version_id=1,
    needed=lambda drive: drive.in_pio_transfer,
    pre_save=_pio_pre_save,
    post_load=_pio_post_load,
    fields=(
        I32("req_nb_sectors"),
        VArray("io_buffer", count=lambda drive: IO_BUFFER_BYTES, element=U8),
        I32("cur_io_buffer_offset"),
        I32("cur_io_buffer_len"),
        U8("end_transfer_fn_idx"),
        I32("elementary_transfer_size"),
        I32("packet_transfer_size"),
    ),
)

IDE_DRIVE = VMStateDescription(
    name="ide_drive",
    version_id=3,
    minimum_version_id=0,
    post_load=_post_load,
    fields=(
        I32("mult_sectors"),
        I32("identify_set"),
        Buffer(
            "identify_data", IDENTIFY_BYTES, test=lambda drive, version: drive.identify_set != 0
        ),
        U8("feature"),
        U8("error"),
        U32("nsector"),
        U8("sector"),
        U8("lcyl"),
        U8("hcyl"),
        U8("hob_feature"),
        U8("hob_sector"),
        U8("hob_nsector"),
        U8("hob_lcyl"),
        U8("hob_hcyl"),
        U8("select"),
        U8("status"),
        U8("lba48"),
        U8("sense_key"),
        U8("asc"),
        U8("cdrom_changed", version_id=3),
    ),
    subsections=(
        IDE_DRIVE_PIO_STATE,
        VMStateDescription(
            name="ide_drive/tray_state",
            version_id=1,
            minimum_version_id=1,
            needed=lambda drive: drive.tray_open or drive.tray_locked,
            fields=(Bool("tray_open"), Bool("tray_locked")),
        ),
        VMStateDescription(
            name="ide_drive/atapi/gesn_state",
            version_id=1,
            minimum_version_id=1,
            needed=lambda drive: drive.new_media or drive.eject_request,
            fields=(
                Bool("events.new_media", attr="new_media"),
                Bool("events.eject_request", attr="eject_request"),
            ),
        ),
    ),
)
