/* SPDX-License-Identifier: MIT */
/*
 * The second half of an operation: the page is present (its probe came back), nothing sleeps any more.
 * Also the histogram's and the received bitmap's side of it.
 */
#ifndef TOYVM_TOUCH_H
#define TOYVM_TOUCH_H

#include "workload.h"

TOY_INLINE uint32_t histogram_bucket(uint64_t ns)
{
	uint32_t top, sub;

	if (ns < HISTOGRAM_SUB)
		return (uint32_t)ns;
	top = 63 - (uint32_t)__builtin_clzll(ns);
	if (top > HISTOGRAM_TOP_BIT)
		return HISTOGRAM_BUCKETS - 1;
	sub = (uint32_t)(ns >> (top - HISTOGRAM_SUB_BITS)) & (HISTOGRAM_SUB - 1);
	return (top - HISTOGRAM_SUB_BITS + 1) * HISTOGRAM_SUB + sub;
}

TOY_INLINE void histogram_add(struct toy_histogram *h, uint64_t ns)
{
	uint32_t *bucket = &h->bucket[histogram_bucket(ns)];

	__atomic_store_n(bucket, *bucket + 1, __ATOMIC_RELAXED);
	toy_add(&h->count, 1);
	toy_add(&h->sum_ns, ns);
	if (ns > h->max_ns)
		toy_store(&h->max_ns, ns);
}

enum toy_presence { PRESENCE_UNKNOWN, PRESENCE_RECEIVED, PRESENCE_MISSING };

/* Whether the touch of this page has to be timed: a bitmap is attached and lacks the page. */
TOY_INLINE enum toy_presence toy_presence(const struct toy_view *view, struct toy_place at)
{
	const uint64_t *map = (const uint64_t *)(uintptr_t)view->received[at.block];

	if (!map)
		return PRESENCE_UNKNOWN;
	if (__atomic_load_n(&map[at.page / 64], __ATOMIC_RELAXED) >> (at.page % 64) & 1)
		return PRESENCE_RECEIVED;
	return PRESENCE_MISSING;
}

TOY_INLINE void toy_record_bad(struct toy_state *state, struct toy_place at, enum toy_damage damage,
			       uint64_t expected, uint64_t found)
{
	toy_add(&state->errors, 1);
	if (state->bad_count >= TOY_MAX_BAD)
		return;
	state->bad[state->bad_count] = (struct toy_bad){
		.damage = damage, .block = at.block, .page = at.page,
		.expected = expected, .found = found,
	};
	toy_add(&state->bad_count, 1);
}

/*
 * Verify, write if it is a write, and make the operation count. A damaged page is left as it is, so
 * that the sweep finds it too.
 */
TOY_INLINE void toy_finish(const struct toy_layout *layout, const struct toy_workload *workload,
			   struct toy_state *state, uint32_t *log, uint64_t slots,
			   const struct toy_pick *pick, uint64_t *page)
{
	uint64_t key = page_key(layout, pick->at);
	uint64_t word = PAGE_BODY + state->ops % PAGE_BODY_WORDS;
	enum toy_damage damage = page_verify_ends(page, pick->at, key, log[pick->slot]);

	if (damage != DAMAGE_NONE) {
		toy_record_bad(state, pick->at, damage, log[pick->slot], page[PAGE_COUNTER]);
	} else if (page[word] != page_body_word(key, word)) {
		toy_record_bad(state, pick->at, DAMAGE_BODY, page_body_word(key, word), page[word]);
	} else if (pick->is_write) {
		page_write_counter(page, key, log[pick->slot] + 1);
		__atomic_store_n(&log[pick->slot], log[pick->slot] + 1, __ATOMIC_RELAXED);
		toy_add(&state->writes, 1);
	}
	state->position = toy_next_position(layout, workload, pick, page, slots);
	state->rng = pick->rng;
	toy_add(&state->ops, 1);
}

#endif
