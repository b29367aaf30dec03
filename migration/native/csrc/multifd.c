#include "multifd.h"

#include "be.h"
#include "ramrec.h"

#include <string.h>

enum { AT_FLAGS = 8, AT_SLOTS = 12, AT_NORMAL = 16, AT_SIZE = 20, AT_NUMBER = 24, AT_ZERO = 32, AT_ID = 64, AT_OFFSETS = 320 };

void multifd_encode(uint8_t *buf, const struct multifd_packet *p)
{
	memset(buf, 0, MULTIFD_HEADER);
	put_be32(buf, MULTIFD_MAGIC);
	put_be32(buf + 4, MULTIFD_VERSION);
	put_be32(buf + AT_FLAGS, p->flags);
	put_be32(buf + AT_SLOTS, p->slots);
	put_be32(buf + AT_NORMAL, p->normal);
	put_be32(buf + AT_SIZE, p->normal << RAM_PAGE_BITS);
	put_be64(buf + AT_NUMBER, p->number);
	put_be32(buf + AT_ZERO, p->zero);
	memcpy(buf + AT_ID, p->idstr, strnlen(p->idstr, sizeof(p->idstr) - 1));
	for (uint32_t i = 0; i < p->normal + p->zero; i++)
		put_be64(buf + AT_OFFSETS + 8 * i, p->offsets[i]);
}

const char *multifd_decode(const uint8_t *buf, struct multifd_packet *out)
{
	uint32_t size = get_be32(buf + AT_SIZE);

	if (get_be32(buf) != MULTIFD_MAGIC || get_be32(buf + 4) != MULTIFD_VERSION)
		return "no multifd packet starts here";
	out->flags = get_be32(buf + AT_FLAGS);
	if (out->flags & MULTIFD_DEVICE)
		return "device state over multifd is not offered by this runtime";
	if (out->flags & MULTIFD_METHODS)
		return "compressed pages (multifd-compression) are not offered by this runtime";
	if (out->flags & ~MULTIFD_SYNC)
		return "unknown packet flags";
	out->slots = get_be32(buf + AT_SLOTS);
	out->normal = get_be32(buf + AT_NORMAL);
	out->zero = get_be32(buf + AT_ZERO);
	out->number = get_be64(buf + AT_NUMBER);
	if (out->slots > MULTIFD_SLOTS)
		return "room for more pages than a packet has";
	if (out->normal > out->slots || out->zero > out->slots - out->normal)
		return "more pages than the packet has room for";
	/* A packet of 7.2 without pages may keep the size of the one before; no data follow then. */
	if (out->normal && size != out->normal << RAM_PAGE_BITS)
		return "another number of bytes than its pages have";
	memcpy(out->idstr, buf + AT_ID, sizeof(out->idstr));
	if (out->idstr[sizeof(out->idstr) - 1])
		return "a block name without an end";
	for (uint32_t i = 0; i < out->normal + out->zero; i++)
		out->offsets[i] = get_be64(buf + AT_OFFSETS + 8 * i);
	return NULL;
}
