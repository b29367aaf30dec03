/*
 * A relay is one migration's destination and another's source at once. What its own destination asks for
 * before it has come is asked for upstream; what comes is offered downstream, at once if somebody waits.
 */
#include "dst.h"
#include "src.h"

#include "bitmap.h"

#include <errno.h>

bool src_ask_upstream(struct src *s, uint32_t index, uint64_t page)
{
	const struct src_block *b = &s->blocks[index];
	const struct dst_block *from;
	uint64_t unit = b->page_size >> RAM_PAGE_BITS;

	if (!s->upstream || !b->wanted)
		return false;
	from = &s->upstream->blocks[index];
	/* The bit first: a page that comes after this line finds it, one that came before is seen below. */
	bitmap_set_atomic(b->wanted, page, unit);
	if (bitmap_test(b->dirty, page)) {
		struct src_request again = { .block = index, .first = page, .count = unit };

		return src_push_request(s, &again) == 0;
	}
	/* Sent before; or it comes this moment, between its two bitmaps, and finds that it is wanted. */
	if (bitmap_test(from->received, page))
		return false;
	if (bitmap_test_and_set(from->requested, page))
		return true;
	/* An upstream that is gone tells its own thread; the downstream guest waits. */
	dst_ask(s->upstream, index, page << RAM_PAGE_BITS, (uint32_t)b->page_size);
	return true;
}

/*
 * Whoever waits for the page gets it now if the stream is idle. A downstream that broke is its own threads'
 * concern: upstream goes on, what comes stays dirty until downstream is back.
 */
static void serve_now(struct src *s)
{
	if (s->urgent.ch) {
		src_serve_urgent(s);
	} else if (chan_trylock(s->ch)) {
		src_serve_locked(s);
		chan_unlock(s->ch);
	}
	src_kick(s);
}

/* Called by upstream's listen threads, whole host pages by whole host pages when they are all in. */
int src_pages_came(struct src *s, uint32_t index, uint64_t offset, uint64_t length)
{
	struct src_block *b = &s->blocks[index];
	const struct dst_block *from = &s->upstream->blocks[index];
	uint64_t unit = b->page_size >> RAM_PAGE_BITS;
	uint64_t first = (offset >> RAM_PAGE_BITS) & ~(unit - 1);
	uint64_t end = (offset + length) >> RAM_PAGE_BITS;
	bool is_wanted = false;

	for (; first < end; first += unit) {
		struct src_request r = { .block = index, .first = first, .count = unit };

		if (unit > 1 &&
		    bitmap_next_clear(from->received, first + unit, first) < first + unit)
			continue;
		bitmap_set_atomic(b->dirty, first, unit);
		if (b->scan != b->dirty)
			bitmap_set_atomic(b->scan, first, unit);
		/* A full ring: the scan sends it in its turn. */
		if (bitmap_test(b->wanted, first) && src_push_request(s, &r) == 0)
			is_wanted = true;
	}
	if (is_wanted && s->postcopy)
		serve_now(s);
	else
		src_kick(s);
	return 0;
}
