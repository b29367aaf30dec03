/* One packet of a multifd channel, to and from bytes: a fixed header with page offsets; its pages follow. */
#ifndef MIG_MULTIFD_H
#define MIG_MULTIFD_H

#include <stdint.h>

#define MULTIFD_SLOTS 128u	/* pages a packet names at most: 512 KiB of them */
#define MULTIFD_CHANNELS 255u
#define MULTIFD_HEADER (320u + 8u * MULTIFD_SLOTS)
#define MULTIFD_MAGIC 0x11223344u
#define MULTIFD_VERSION 1u

#define MULTIFD_SYNC 0x1u
#define MULTIFD_METHODS 0x3eu	/* how the pages are compressed; 0: not */
#define MULTIFD_DEVICE 0x40u	/* device state, not pages */

struct multifd_packet {
	uint32_t flags;
	uint32_t slots;		/* room for offsets, as the sender says: MULTIFD_SLOTS, or 0 in an empty packet */
	uint32_t normal;	/* pages whose data follow */
	uint32_t zero;		/* pages that are zero, named behind them */
	uint64_t number;	/* over all channels of one migration */
	char idstr[256];
	uint64_t offsets[MULTIFD_SLOTS];	/* bytes into the block */
};

/* All MULTIFD_HEADER bytes of it. */
void multifd_encode(uint8_t *buf, const struct multifd_packet *p);
/*
 * From MULTIFD_HEADER bytes. NULL: *out is filled, and its counts are in range; else what is wrong with them.
 * Block name and offsets are those of the packet: to be checked by who knows the blocks.
 */
const char *multifd_decode(const uint8_t *buf, struct multifd_packet *out);

#endif
