/* SPDX-License-Identifier: MIT */
/*
 * Which page a vCPU touches next. A pick never changes the state: it returns the state after the
 * operation, to be stored when the operation is done. Integers only, because the KVM guest runs it.
 */
#ifndef TOYVM_WORKLOAD_H
#define TOYVM_WORKLOAD_H

#include "page.h"

struct toy_pick {
	uint64_t slot;                          /* in the vCPU's log */
	struct toy_place at;
	uint64_t rng;                           /* the state afterwards */
	bool is_write;
};

TOY_INLINE uint64_t toy_random(uint64_t *rng)
{
	*rng += PAGE_STRIDE;
	return toy_mix(*rng);
}

/* Uniform in [0, n): the high half of a 64 by 64 bit product. */
TOY_INLINE uint64_t toy_below(uint64_t random, uint64_t n)
{
	return (uint64_t)((unsigned __int128)random * n >> 64);
}

/*
 * 2^x for x in 32.32 fixed point, below 2^32. The fraction by 1 + f(0.6565 + 0.3435 f), 0.3 % off at most,
 * which no workload notices.
 */
TOY_INLINE uint64_t toy_exp2(uint64_t x)
{
	uint64_t whole = x >> 32, f = x & 0xFFFFFFFFu;
	uint64_t inner = 2819646201ull + (1475321095ull * f >> 32);

	return (1ull << 32 | (f * inner >> 32)) << (whole > 31 ? 31 : whole) >> 32;
}

/* log2 of n in 32.32 fixed point, linear between powers of two. */
TOY_INLINE uint64_t toy_log2(uint64_t n)
{
	uint64_t whole = 63 - (uint64_t)__builtin_clzll(n);

	return whole << 32 | (whole > 32 ? n >> (whole - 32) : n << (32 - whole)) % (1ull << 32);
}

/*
 * Zipf's law with exponent 1: the rank n^u for a uniform u has density 1/rank. Ranks are then spread
 * over the slots, so that hot pages are not neighbours.
 */
TOY_INLINE uint64_t toy_zipf(uint64_t random, const struct toy_share *share)
{
	uint64_t exponent = toy_below(random, toy_log2(share->slots + 1));
	uint64_t rank = toy_exp2(exponent) - 1;

	if (rank >= share->slots)
		rank = share->slots - 1;
	return rank * share->step % share->slots;
}

TOY_INLINE struct toy_pick toy_pick(const struct toy_layout *layout,
				    const struct toy_workload *workload, const struct toy_state *state,
				    const struct toy_share *share)
{
	struct toy_pick pick = { .rng = state->rng };
	uint64_t choice = toy_random(&pick.rng);
	uint32_t kind = __atomic_load_n(&workload->kind, __ATOMIC_RELAXED);
	uint32_t writes = __atomic_load_n(&workload->write_share, __ATOMIC_RELAXED);

	pick.is_write = (toy_random(&pick.rng) & 0xFFFF) < writes;
	if (kind == TOY_RANDOM)
		pick.slot = toy_below(choice, share->slots);
	else if (kind == TOY_ZIPF)
		pick.slot = toy_zipf(choice, share);
	else
		pick.slot = state->position;    /* where the last touch pointed */
	pick.at = toy_place_of(layout, pick.slot * layout->smp + share->owner);
	return pick;
}

/* Where the touch of `pick` points: the neighbour, or what the page itself says. */
TOY_INLINE uint64_t toy_next_position(const struct toy_layout *layout,
				      const struct toy_workload *workload, const struct toy_pick *pick,
				      const uint64_t *page, uint64_t slots)
{
	uint32_t kind = __atomic_load_n(&workload->kind, __ATOMIC_RELAXED);

	if (kind == TOY_CHASE && page[PAGE_LINK] < layout->working_set)
		return page[PAGE_LINK] / layout->smp % slots;
	return pick->slot + 1 < slots ? pick->slot + 1 : 0;
}

#endif
