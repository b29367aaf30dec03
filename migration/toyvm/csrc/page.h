/* SPDX-License-Identifier: MIT */
/*
 * The oracle's page format.
 *
 *   word 0        identity: magic ^ block << 48 ^ page
 *   word 1, 2     counter (32 bits used), check value of (seed, block, page, counter)
 *   word 3        link: global index of the page a pointer chase visits next
 *   word 4..509   body: constant pattern of (seed, block, page)
 *   word 510, 511 counter and check again
 *
 * The check value makes counter and place one: no mix of honest pages of different places or ages
 * passes. Head and tail lie at opposite ends, so a page copied while it was written shows. What the
 * page cannot show by itself, being whole but old, the vCPUs' log outside guest RAM shows.
 */
#ifndef TOYVM_PAGE_H
#define TOYVM_PAGE_H

#include "toy.h"

#define PAGE_MAGIC 0x0ACE0FBA5E5EED00ull
#define PAGE_COUNTER 1u
#define PAGE_CHECK 2u
#define PAGE_LINK 3u
#define PAGE_BODY 4u
#define PAGE_TAIL_COUNTER (TOY_PAGE_WORDS - 2)
#define PAGE_TAIL_CHECK (TOY_PAGE_WORDS - 1)
#define PAGE_BODY_WORDS (PAGE_TAIL_COUNTER - PAGE_BODY)
#define PAGE_STRIDE 0x9E3779B97F4A7C15ull
#define PAGE_NO_LINK UINT64_MAX

struct toy_place {
	uint32_t block;
	uint64_t page;
};

TOY_INLINE uint64_t page_identity(struct toy_place at)
{
	return PAGE_MAGIC ^ (uint64_t)at.block << 48 ^ at.page;
}

/* Everything else on a page grows from this. Never 0 in practice, and different on every seed. */
TOY_INLINE uint64_t page_key(const struct toy_layout *layout, struct toy_place at)
{
	return toy_mix(layout->seed * PAGE_STRIDE + ((uint64_t)at.block << 48 ^ at.page) + 1);
}

TOY_INLINE uint64_t page_check_value(uint64_t key, uint64_t counter)
{
	return toy_mix(key ^ (counter + 1) * PAGE_STRIDE);
}

TOY_INLINE uint64_t page_body_word(uint64_t key, uint64_t word)
{
	return key + word * PAGE_STRIDE;
}

TOY_INLINE struct toy_place toy_place_of(const struct toy_layout *layout, uint64_t index)
{
	struct toy_place at = { 0, 0 };

	while (at.block + 1 < layout->block_count && index >= layout->first[at.block + 1])
		at.block++;
	at.page = index - layout->first[at.block];
	return at;
}

/* How many pages vCPU `owner` has: its slots are index / smp. */
TOY_INLINE uint64_t toy_slots(const struct toy_layout *layout, uint64_t owner)
{
	if (!layout->smp || layout->working_set <= owner)
		return 0;
	return (layout->working_set - owner - 1) / layout->smp + 1;
}

TOY_INLINE bool toy_is_coprime(uint64_t a, uint64_t b)
{
	while (b) {
		uint64_t rest = a % b;

		a = b;
		b = rest;
	}
	return a == 1;
}

/* A step near the golden section of n and coprime to it: slot -> slot + step visits every slot
 * before it comes back, and never two neighbours in a row. */
TOY_INLINE uint64_t toy_step(uint64_t slots)
{
	uint64_t step = slots * 5 / 8 + 1;

	while (!toy_is_coprime(step, slots))
		step++;
	return step;
}

/* One vCPU's part of the working set. */
struct toy_share {
	uint64_t owner;
	uint64_t slots;
	uint64_t step;
};

TOY_INLINE struct toy_share toy_share_of(const struct toy_layout *layout, uint64_t owner)
{
	struct toy_share share = { .owner = owner, .slots = toy_slots(layout, owner) };

	share.step = share.slots ? toy_step(share.slots) : 0;
	return share;
}

/* `share` is the owner's; pages outside the working set have no owner and no link. */
TOY_INLINE uint64_t page_link(const struct toy_layout *layout, const struct toy_share *share,
			      uint64_t index)
{
	if (!layout->smp || index >= layout->working_set)
		return PAGE_NO_LINK;
	return (index / layout->smp + share->step) % share->slots * layout->smp + share->owner;
}

TOY_INLINE void page_write_counter(uint64_t *page, uint64_t key, uint32_t counter)
{
	uint64_t check = page_check_value(key, counter);

	page[PAGE_COUNTER] = counter;
	page[PAGE_CHECK] = check;
	page[PAGE_TAIL_COUNTER] = counter;
	page[PAGE_TAIL_CHECK] = check;
}

TOY_INLINE enum toy_damage page_identity_damage(const uint64_t *page)
{
	if (!page[0] && !page[PAGE_COUNTER] && !page[PAGE_CHECK])
		return DAMAGE_ZEROED;
	/* The upper half of the magic is left alone by every place we ever fill. */
	if ((page[0] ^ PAGE_MAGIC) >> 48 < TOY_MAX_BLOCKS &&
	    ((page[0] ^ PAGE_MAGIC) & 0xFFFFFFFFFFFFull) >> 40 == 0)
		return DAMAGE_MISPLACED;
	return DAMAGE_IDENTITY;
}

/* What a touch looks at: everything that changes. Body and link are left to the sweep. */
TOY_INLINE enum toy_damage page_verify_ends(const uint64_t *page, struct toy_place at, uint64_t key,
					    uint32_t expected)
{
	uint64_t counter = page[PAGE_COUNTER], check = page[PAGE_CHECK];

	if (page[0] != page_identity(at))
		return page_identity_damage(page);
	if (check != page_check_value(key, counter) || counter > UINT32_MAX)
		return DAMAGE_CHECK;
	if (page[PAGE_TAIL_COUNTER] != counter || page[PAGE_TAIL_CHECK] != check) {
		if (page[PAGE_TAIL_CHECK] == page_check_value(key, page[PAGE_TAIL_COUNTER]))
			return DAMAGE_TORN;
		return DAMAGE_CHECK;
	}
	if (counter == expected)
		return DAMAGE_NONE;
	/* Counters wrap after 2^32 writes to one page, so age is a signed distance. */
	return (int32_t)((uint32_t)counter - expected) < 0 ? DAMAGE_STALE : DAMAGE_FUTURE;
}

#endif
