/* One RAM record's head, to and from bytes: the only codec of these records, for the loops and for Python. */
#ifndef MIG_RAMREC_H
#define MIG_RAMREC_H

#include <stddef.h>
#include <stdint.h>

#define RAM_PAGE_BITS 12
#define RAM_PAGE_BYTES (1u << RAM_PAGE_BITS)
#define RAM_FLAG_MASK (RAM_PAGE_BYTES - 1)

#define RAM_FLAG_ZERO 0x002u
#define RAM_FLAG_MEM_SIZE 0x004u
#define RAM_FLAG_PAGE 0x008u
#define RAM_FLAG_EOS 0x010u
#define RAM_FLAG_CONTINUE 0x020u
#define RAM_FLAG_XBZRLE 0x040u
#define RAM_FLAG_HOOK 0x080u
#define RAM_FLAG_COMPRESS 0x100u
#define RAM_FLAG_MULTIFD_FLUSH 0x200u

#define RAM_HEAD_MAX (8 + 1 + 255 + 4)	/* word, block id, longest kind-specific head */

struct ramrec {
	uint64_t offset;	/* bytes into the block, target-page aligned; MEM_SIZE: the total */
	uint32_t kind;		/* one RAM_FLAG_*, without CONTINUE */
	uint32_t has_id;	/* a block name is in the head */
	uint32_t id_at, id_len;	/* where, from the head's first byte */
	uint32_t head_len;	/* bytes before the payload */
	uint32_t payload_len;	/* PAGE, XBZRLE, COMPRESS: bytes that follow the head */
	uint32_t fill;		/* ZERO: the fill byte; XBZRLE: the encoding byte */
};

/* Decode the head at buf. 1: done; 0: more bytes are needed (at most RAM_HEAD_MAX); -EINVAL: no legal flags. */
int ramrec_decode(const uint8_t *buf, size_t len, struct ramrec *out);
/* Write word and, with id, the name. Returns the bytes written (<= 8 + 256). */
size_t ramrec_encode(uint8_t *buf, uint64_t offset, uint32_t kind, const char *id, uint8_t id_len);

#endif
