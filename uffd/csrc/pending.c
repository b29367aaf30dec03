// SPDX-License-Identifier: MIT
#include "pending.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#define FREE	0ull
#define CLAIMED (~0ull)

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static bool claim(struct pending_entry *e, uint64_t address)
{
	return __atomic_compare_exchange_n(&e->address, &address, CLAIMED, false,
					   __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static bool release(struct pending_faults *tbl, struct pending_entry *e, uint64_t address)
{
	if (!__atomic_compare_exchange_n(&e->address, &address, FREE, false, __ATOMIC_ACQ_REL,
					 __ATOMIC_RELAXED))
		return false;
	__atomic_fetch_sub(&tbl->count, 1, __ATOMIC_RELAXED);
	return true;
}

void pending_init(struct pending_faults *tbl)
{
	memset(tbl, 0, sizeof(*tbl));
}

static void fill(struct pending_entry *e, uint64_t addr, uint32_t tid, uint64_t since_ns)
{
	__atomic_store_n(&e->tid, tid, __ATOMIC_RELAXED);
	__atomic_store_n(&e->since_ns, since_ns, __ATOMIC_RELAXED);
	__atomic_store_n(&e->address, addr, __ATOMIC_RELEASE);
}

/* The entry of the same sleeper, if it has one. */
static bool update(struct pending_faults *tbl, uint64_t addr, uint32_t tid, uint64_t since_ns)
{
	for (uint32_t i = 0; i < PENDING_SLOTS; i++) {
		struct pending_entry *e = &tbl->entries[i];
		uint64_t had = __atomic_load_n(&e->address, __ATOMIC_ACQUIRE);

		if (had == FREE || had == CLAIMED)
			continue;
		if (__atomic_load_n(&e->tid, __ATOMIC_RELAXED) != tid || (tid == 0 && had != addr))
			continue;
		if (had == addr)
			return true;
		if (claim(e, had)) {
			fill(e, addr, tid, since_ns);
			return true;
		}
	}
	return false;
}

int pending_add(struct pending_faults *tbl, uint64_t addr, uint32_t tid)
{
	uint64_t since_ns = now_ns();

	if (__atomic_load_n(&tbl->count, __ATOMIC_RELAXED) > 0 && update(tbl, addr, tid, since_ns))
		return 0;
	for (uint32_t i = 0; i < PENDING_SLOTS; i++) {
		struct pending_entry *e = &tbl->entries[i];

		if (__atomic_load_n(&e->address, __ATOMIC_RELAXED) != FREE || !claim(e, FREE))
			continue;
		/* Counted before it can be seen, so that a remover never counts below zero. */
		__atomic_fetch_add(&tbl->count, 1, __ATOMIC_RELAXED);
		fill(e, addr, tid, since_ns);
		return 0;
	}
	__atomic_fetch_add(&tbl->dropped, 1, __ATOMIC_RELAXED);
	return -ENOSPC;
}

uint32_t pending_remove_range(struct pending_faults *tbl, uint64_t addr, uint64_t len)
{
	uint32_t removed = 0;

	if (__atomic_load_n(&tbl->count, __ATOMIC_RELAXED) == 0)
		return 0;
	for (uint32_t i = 0; i < PENDING_SLOTS; i++) {
		struct pending_entry *e = &tbl->entries[i];
		uint64_t at = __atomic_load_n(&e->address, __ATOMIC_ACQUIRE);

		if (at != FREE && at != CLAIMED && at - addr < len)
			removed += release(tbl, e, at);
	}
	return removed;
}

/* A consistent copy, or false when the entry is free or changes under our eyes. */
static bool snapshot(const struct pending_entry *e, struct pending_entry *out)
{
	uint64_t at = __atomic_load_n(&e->address, __ATOMIC_ACQUIRE);

	if (at == FREE || at == CLAIMED)
		return false;
	*out = (struct pending_entry){
		.address = at,
		/* Acquire: the second look at the address must not move above these. */
		.since_ns = __atomic_load_n(&e->since_ns, __ATOMIC_ACQUIRE),
		.tid = __atomic_load_n(&e->tid, __ATOMIC_ACQUIRE),
	};
	return __atomic_load_n(&e->address, __ATOMIC_RELAXED) == at;
}

bool pending_oldest(const struct pending_faults *tbl, struct pending_entry *out)
{
	struct pending_entry e;
	bool found = false;

	for (uint32_t i = 0; i < PENDING_SLOTS; i++) {
		if (!snapshot(&tbl->entries[i], &e) || (found && e.since_ns >= out->since_ns))
			continue;
		*out = e;
		found = true;
	}
	return found;
}

uint32_t pending_list(const struct pending_faults *tbl, struct pending_entry *out, uint32_t max)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < PENDING_SLOTS && n < max; i++)
		if (snapshot(&tbl->entries[i], &out[n]))
			n++;
	return n;
}
