/* XBZRLE on the source: a cache of pages as the destination has them, and the way from there. */
#include "src.h"

#include "be.h"
#include "xbzrle.h"

#include <errno.h>
#include <stdlib.h>

int src_xbzrle_init(struct src *s, uint64_t cache_bytes)
{
	s->xb_slots = cache_bytes >> RAM_PAGE_BITS;
	s->xb_pages = malloc(cache_bytes);
	s->xb_tags = calloc(s->xb_slots ? s->xb_slots : 1, sizeof(*s->xb_tags));
	if (s->xb_slots && s->xb_pages && s->xb_tags)
		return 0;
	src_xbzrle_free(s);
	return -ENOMEM;
}

void src_xbzrle_free(struct src *s)
{
	free(s->xb_pages);
	free(s->xb_tags);
	s->xb_pages = NULL;
	s->xb_tags = NULL;
}

void src_xbzrle_activate(struct src *s)
{
	s->xb_active = s->xb_pages != NULL;
}

static void count(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

/* A miss fills the slot with what goes out whole; the guest may write meanwhile, so what is sent is the copy. */
static int put_whole(struct src *s, struct src_tx *tx, uint32_t index, uint64_t page, const uint8_t *copy)
{
	struct src_block *b = &s->blocks[index];
	uint8_t *out = chan_reserve(tx->ch, RAM_HEAD_MAX + RAM_PAGE_BYTES);
	const char *id = tx->last_block == index ? NULL : b->idstr;
	size_t n;

	if (!out)
		return tx->ch->werror ? tx->ch->werror : -EIO;
	n = ramrec_encode(out, page << RAM_PAGE_BITS, RAM_FLAG_PAGE, id, b->id_len);
	memcpy(out + n, copy, RAM_PAGE_BYTES);
	chan_commit(tx->ch, n + RAM_PAGE_BYTES);
	tx->last_block = index;
	count(&s->stats.pages_normal, 1);
	return 1;
}

static uint64_t slot_of(const struct src *s, uint64_t key)
{
	return (key * 0x9e3779b97f4a7c15u) % s->xb_slots;
}

/* The page goes out as zero: what is kept of it must follow, or a later difference would be against bytes that
 * the destination has no longer. */
void src_xbzrle_zero(struct src *s, uint32_t index, uint64_t page)
{
	uint64_t key = ((uint64_t)index << 40 | page) + 1, slot = slot_of(s, key);

	if (s->xb_tags[slot] == key)
		memset(s->xb_pages + (slot << RAM_PAGE_BITS), 0, RAM_PAGE_BYTES);
}

int src_xbzrle_put(struct src *s, struct src_tx *tx, uint32_t index, uint64_t page)
{
	struct src_block *b = &s->blocks[index];
	uint64_t key = ((uint64_t)index << 40 | page) + 1, slot = slot_of(s, key);
	uint8_t *cached = s->xb_pages + (slot << RAM_PAGE_BITS), *out;
	const char *id = tx->last_block == index ? NULL : b->idstr;
	uint8_t now[RAM_PAGE_BYTES];
	int len;
	size_t n;

	memcpy(now, b->host + (page << RAM_PAGE_BITS), sizeof(now));
	if (s->xb_tags[slot] != key) {
		count(&s->stats.xbzrle_misses, 1);
		s->xb_tags[slot] = key;
		memcpy(cached, now, sizeof(now));
		return put_whole(s, tx, index, page, now);
	}
	out = chan_reserve(tx->ch, RAM_HEAD_MAX + RAM_PAGE_BYTES);
	if (!out)
		return tx->ch->werror ? tx->ch->werror : -EIO;
	n = ramrec_encode(out, page << RAM_PAGE_BITS, RAM_FLAG_XBZRLE, id, b->id_len);
	len = xbzrle_encode(cached, now, sizeof(now), out + n + 3, RAM_PAGE_BYTES - 3);
	memcpy(cached, now, sizeof(now));
	if (!len) {
		count(&s->stats.xbzrle_same, 1);
		return 1;
	}
	if (len < 0) {
		count(&s->stats.xbzrle_overflows, 1);
		return put_whole(s, tx, index, page, now);
	}
	out[n] = 1;
	put_be16(out + n + 1, (uint16_t)len);
	chan_commit(tx->ch, n + 3 + (size_t)len);
	tx->last_block = index;
	count(&s->stats.xbzrle_pages, 1);
	count(&s->stats.xbzrle_bytes, (uint64_t)len + 3);
	return 1;
}
