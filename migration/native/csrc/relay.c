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

/* Bits for the whole run at once; whether somebody waits for one of them is looked at after. */
static void offer(struct src_block *b, uint64_t first, uint64_t count, bool is_zero)
{
	bitmap_set_atomic(b->dirty, first, count);
	/* Zeros are what the destination has unless it asks: not pushed. */
	if (b->scan != b->dirty && !is_zero)
		bitmap_set_atomic(b->scan, first, count);
}

/* Requests for what was waited for of [first, end). True if there were any. A full ring: the scan sends data in
 * its turn; zeros, which it does not send, are made its business. */
static bool answer(struct src *s, uint32_t index, uint64_t first, uint64_t end)
{
	struct src_block *b = &s->blocks[index];
	uint64_t unit = b->page_size >> RAM_PAGE_BITS;
	bool found = false;

	while ((first = bitmap_next_set(b->wanted, end, first)) < end) {
		struct src_request r = { .block = index, .first = first & ~(unit - 1), .count = unit };

		if (src_push_request(s, &r) == 0)
			found = true;
		else if (b->scan != b->dirty)
			bitmap_set_atomic(b->scan, r.first, unit);
		first = r.first + unit;
	}
	return found;
}

/* Called by upstream's listen threads, whole host pages by whole host pages when they are all in. */
int src_pages_came(struct src *s, uint32_t index, uint64_t offset, uint64_t length, bool is_zero)
{
	struct src_block *b = &s->blocks[index];
	const struct dst_block *from = &s->upstream->blocks[index];
	uint64_t unit = b->page_size >> RAM_PAGE_BITS;
	uint64_t first = (offset >> RAM_PAGE_BITS) & ~(unit - 1);
	uint64_t end = (offset + length) >> RAM_PAGE_BITS;
	bool is_wanted = false;

	if (unit == 1) {
		offer(b, first, end - first, is_zero);
		is_wanted = answer(s, index, first, end);
	}
	for (; unit > 1 && first < end; first += unit) {
		if (bitmap_next_clear(from->received, first + unit, first) < first + unit)
			continue;
		offer(b, first, unit, false);
		is_wanted |= answer(s, index, first, first + unit);
	}
	if (is_wanted && s->postcopy)
		serve_now(s);
	else
		src_kick(s);
	return 0;
}
