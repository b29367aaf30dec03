#include "ramrec.h"

#include "be.h"

#include <errno.h>

static int kind_is_single(uint32_t kind)
{
	switch (kind) {
	case RAM_FLAG_ZERO: case RAM_FLAG_MEM_SIZE: case RAM_FLAG_PAGE: case RAM_FLAG_EOS:
	case RAM_FLAG_XBZRLE: case RAM_FLAG_COMPRESS: case RAM_FLAG_MULTIFD_FLUSH:
		return 1;
	default:
		return 0;
	}
}

int ramrec_decode(const uint8_t *buf, size_t len, struct ramrec *out)
{
	size_t at = 8;
	uint64_t word;
	uint32_t flags;

	if (len < at)
		return 0;
	word = get_be64(buf);
	flags = (uint32_t)(word & RAM_FLAG_MASK);
	memset(out, 0, sizeof(*out));
	out->offset = word & ~(uint64_t)RAM_FLAG_MASK;
	out->kind = flags & ~RAM_FLAG_CONTINUE;
	if (!kind_is_single(out->kind))
		return -EINVAL;
	if (out->kind == RAM_FLAG_EOS || out->kind == RAM_FLAG_MULTIFD_FLUSH) {
		if (flags & RAM_FLAG_CONTINUE || out->offset)
			return -EINVAL;
		out->head_len = 8;
		return 1;
	}
	if (out->kind == RAM_FLAG_MEM_SIZE) {
		if (flags & RAM_FLAG_CONTINUE)
			return -EINVAL;
		out->head_len = 8;
		return 1;
	}
	if (!(flags & RAM_FLAG_CONTINUE)) {
		if (len < at + 1)
			return 0;
		out->has_id = 1;
		out->id_len = buf[at];
		out->id_at = (uint32_t)at + 1;
		at += 1 + out->id_len;
		if (!out->id_len)
			return -EINVAL;
	}
	if (out->kind == RAM_FLAG_ZERO) {
		if (len < at + 1)
			return 0;
		out->fill = buf[at];
		at += 1;
	} else if (out->kind == RAM_FLAG_XBZRLE) {
		if (len < at + 3)
			return 0;
		out->fill = buf[at];
		out->payload_len = get_be16(buf + at + 1);
		at += 3;
	} else if (out->kind == RAM_FLAG_COMPRESS) {
		if (len < at + 4)
			return 0;
		out->payload_len = get_be32(buf + at);
		at += 4;
	} else {
		if (len < at)
			return 0;
		out->payload_len = RAM_PAGE_BYTES;
	}
	out->head_len = (uint32_t)at;
	return 1;
}

size_t ramrec_encode(uint8_t *buf, uint64_t offset, uint32_t kind, const char *id, uint8_t id_len)
{
	size_t at = 8;

	put_be64(buf, offset | kind | (id ? 0 : RAM_FLAG_CONTINUE));
	if (id) {
		buf[at] = id_len;
		memcpy(buf + at + 1, id, id_len);
		at += 1 + id_len;
	}
	return at;
}
