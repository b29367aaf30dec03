/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "oracle.h"

#include <string.h>

static void oracle_fill_page(const struct toy_layout *layout, const struct toy_share *shares,
			     uint64_t index, uint64_t *page)
{
	struct toy_place at = toy_place_of(layout, index);
	uint64_t key = page_key(layout, at), word;

	page[0] = page_identity(at);
	page[PAGE_LINK] = page_link(layout, layout->smp ? &shares[index % layout->smp] : NULL, index);
	for (word = PAGE_BODY; word < PAGE_TAIL_COUNTER; word++)
		page[word] = page_body_word(key, word);
	page_write_counter(page, key, 0);
}

static void oracle_shares(const struct toy_layout *layout, struct toy_share *shares)
{
	uint32_t i;

	for (i = 0; i < layout->smp; i++)
		shares[i] = toy_share_of(layout, i);
}

void oracle_fill(const struct toy_layout *layout, const uint64_t *base)
{
	struct toy_share shares[TOY_MAX_SMP];
	uint32_t block;
	uint64_t page;

	oracle_shares(layout, shares);
	for (block = 0; block < layout->block_count; block++)
		for (page = 0; page < layout->filled[block]; page++)
			oracle_fill_page(layout, shares, layout->first[block] + page,
					 (uint64_t *)(uintptr_t)(base[block] + page * TOY_PAGE_BYTES));
}

static bool oracle_body_holds(const uint64_t *page, uint64_t key, uint64_t *expected, uint64_t *found)
{
	uint64_t word, wrong = 0;

	/* Without a way out of the loop the compiler can do it several words at a time. */
	for (word = PAGE_BODY; word < PAGE_TAIL_COUNTER; word++)
		wrong |= page[word] ^ page_body_word(key, word);
	if (!wrong)
		return true;
	for (word = PAGE_BODY; page[word] == page_body_word(key, word); word++)
		;
	*expected = page_body_word(key, word);
	*found = page[word];
	return false;
}

static enum toy_damage oracle_judge_filled(const struct toy_layout *layout,
					   const struct toy_share *shares, struct toy_place at,
					   const uint64_t *page, uint32_t counter, uint64_t *expected,
					   uint64_t *found)
{
	uint64_t key = page_key(layout, at), index = layout->first[at.block] + at.page, link;
	enum toy_damage damage = page_verify_ends(page, at, key, counter);

	*expected = counter;
	*found = page[PAGE_COUNTER];
	if (damage == DAMAGE_MISPLACED || damage == DAMAGE_IDENTITY) {
		*expected = page_identity(at);
		*found = page[0];
	}
	if (damage != DAMAGE_NONE)
		return damage;
	link = page_link(layout, layout->smp ? &shares[index % layout->smp] : NULL, index);
	if (page[PAGE_LINK] != link) {
		*expected = link;
		*found = page[PAGE_LINK];
		return DAMAGE_LINK;
	}
	return oracle_body_holds(page, key, expected, found) ? DAMAGE_NONE : DAMAGE_BODY;
}

static enum toy_damage oracle_judge_empty(const uint64_t *page, uint64_t *expected, uint64_t *found)
{
	uint64_t word, any = 0;

	for (word = 0; word < TOY_PAGE_WORDS; word++)
		any |= page[word];
	*expected = 0;
	*found = any;
	return any ? DAMAGE_NOT_ZERO : DAMAGE_NONE;
}

int oracle_judge(const struct toy_layout *layout, uint32_t block, uint64_t page, const void *bytes,
		 uint32_t expected)
{
	struct toy_share shares[TOY_MAX_SMP];
	struct toy_place at = { block, page };
	uint64_t copy[TOY_PAGE_WORDS], want, have;

	memcpy(copy, bytes, sizeof(copy));
	if (page >= layout->filled[block])
		return oracle_judge_empty(copy, &want, &have);
	oracle_shares(layout, shares);
	return oracle_judge_filled(layout, shares, at, copy, expected, &want, &have);
}

static void sweep_record(struct oracle_sweep *sweep, enum toy_damage damage, uint64_t expected,
			 uint64_t found)
{
	if (sweep->errors < sweep->bad_room)
		sweep->bad[sweep->errors] = (struct toy_bad){
			.damage = damage, .block = sweep->block, .page = sweep->page,
			.expected = expected, .found = found,
		};
	sweep->by_damage[damage]++;
	sweep->errors++;
}

static uint32_t sweep_expected(const struct oracle_sweep *sweep, uint64_t index)
{
	const struct toy_layout *layout = sweep->layout;
	const uint32_t *log;

	if (index >= layout->working_set || !layout->smp)
		return 0;
	log = (const uint32_t *)(uintptr_t)sweep->logs[index % layout->smp];
	return log ? log[index / layout->smp] : 0;
}

/* The page after the skipped range that holds this one, or this one. */
static uint64_t sweep_skip(const struct oracle_sweep *sweep, uint64_t page)
{
	uint32_t i;

	for (i = 0; i < sweep->skip_count; i++) {
		const struct oracle_range *range = &sweep->skip[i];

		if (range->block == sweep->block && page >= range->first &&
		    page - range->first < range->count)
			page = range->first + range->count;
	}
	return page;
}

/* The first page from this one on that has to be looked at; what is passed over is zero, and counts. */
static uint64_t sweep_next(struct oracle_sweep *sweep, uint64_t page)
{
	uint64_t pages = sweep->layout->page_count[sweep->block], next = page;
	const uint64_t *map = sweep->populated ?
		(const uint64_t *)(uintptr_t)sweep->populated[sweep->block] : NULL;

	if (!map || page < sweep->layout->filled[sweep->block])
		return page;
	for (uint32_t i = 0; i < sweep->skip_count; i++)
		if (sweep->skip[i].block == sweep->block && sweep->skip[i].first > page &&
		    sweep->skip[i].first < pages)
			pages = sweep->skip[i].first;
	while (next < pages && !(map[next / 64] >> next % 64 & 1))
		next = map[next / 64] >> next % 64 ? next + 1 : (next / 64 + 1) * 64;
	if (next > pages)
		next = pages;
	sweep->pages_checked += next - page;
	return next;
}

static void sweep_page(struct oracle_sweep *sweep)
{
	const struct toy_layout *layout = sweep->layout;
	struct toy_place at = { sweep->block, sweep->page };
	const uint64_t *page = (const uint64_t *)(uintptr_t)(sweep->base[at.block] +
							     at.page * TOY_PAGE_BYTES);
	uint64_t expected = 0, found = 0;
	enum toy_damage damage;

	sweep->pages_checked++;
	guard_open(&sweep->guard);
	guard_touch_read(page);
	guard_close(&sweep->guard);
	if (at.page >= layout->filled[at.block])
		damage = oracle_judge_empty(page, &expected, &found);
	else
		damage = oracle_judge_filled(layout, sweep->shares, at, page,
					     sweep_expected(sweep, layout->first[at.block] + at.page),
					     &expected, &found);
	if (damage != DAMAGE_NONE)
		sweep_record(sweep, damage, expected, found);
}

static void sweep_go_on(struct oracle_sweep *sweep)
{
	const struct toy_layout *layout = sweep->layout;
	uint64_t next;

	for (; sweep->block < layout->block_count; sweep->block++, sweep->page = 0) {
		for (;;) {
			sweep->page = sweep_skip(sweep, sweep->page);
			if (sweep->page >= layout->page_count[sweep->block])
				break;
			next = sweep_next(sweep, sweep->page);
			if (next != sweep->page) {
				sweep->page = next;
				continue;
			}
			sweep_page(sweep);
			sweep->page++;
		}
	}
}

int64_t oracle_sweep(struct oracle_sweep *sweep)
{
	sweep->pages_checked = 0;
	sweep->errors = 0;
	sweep->block = 0;
	sweep->page = 0;
	memset(sweep->by_damage, 0, sizeof(sweep->by_damage));
	oracle_shares(sweep->layout, sweep->shares);
	guard_enter(&sweep->guard);
	if (sigsetjmp(sweep->guard.env, 0) == GUARD_LOST) {
		sweep_record(sweep, DAMAGE_LOST, 0, sweep->guard.lost_address);
		sweep->page++;
	}
	sweep_go_on(sweep);
	guard_leave(&sweep->guard);
	return (int64_t)sweep->errors;
}
