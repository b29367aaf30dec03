/* SPDX-License-Identifier: MIT */
/*
 * What a policy wants pushed next, in postcopy, before the scan goes on. One thread advises, the loop takes
 * under the channel's lock; neither waits for the other, and a requested page comes before either.
 */
#include "src.h"

#include <errno.h>

#include "bitmap.h"

int src_advise(struct src *s, uint32_t block, uint64_t first, uint64_t count)
{
	uint32_t tail = atomic_load_explicit(&s->advice_tail, memory_order_relaxed);
	uint64_t pages;

	if (block >= s->block_count)
		return -EINVAL;
	pages = s->blocks[block].used_length >> RAM_PAGE_BITS;
	if (first >= pages || !count || count > pages - first)
		return -EINVAL;
	if (tail - atomic_load_explicit(&s->advice_head, memory_order_acquire) >= SRC_ADVICE)
		return -EAGAIN;
	s->advice[tail % SRC_ADVICE] = (struct src_request){ block, first, count };
	atomic_store_explicit(&s->advice_tail, tail + 1, memory_order_release);
	src_kick(s);
	return 0;
}

bool src_has_advice(struct src *s)
{
	return atomic_load(&s->advice_head) != atomic_load(&s->advice_tail);
}

bool src_next_advised(struct src *s, uint32_t *block, uint64_t *page)
{
	for (;;) {
		uint32_t head = atomic_load_explicit(&s->advice_head, memory_order_relaxed);
		struct src_request *r = &s->advice[head % SRC_ADVICE];
		uint64_t end, found, unit;

		if (head == atomic_load_explicit(&s->advice_tail, memory_order_acquire))
			return false;
		end = r->first + r->count;
		found = r->count ? bitmap_next_set(s->blocks[r->block].dirty, end, r->first) : end;
		if (found < end) {
			/* On behind its host page, whoever gets to send that one. */
			unit = s->blocks[r->block].page_size >> RAM_PAGE_BITS;
			r->first = (found | (unit - 1)) + 1;
			r->count = r->first < end ? end - r->first : 0;
			*block = r->block;
			*page = found;
			return true;
		}
		atomic_store_explicit(&s->advice_head, head + 1, memory_order_release);
	}
}
