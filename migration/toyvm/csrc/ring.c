/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ring.h"

#include <string.h>

#include "page.h"
#include "vcpu.h"

static struct ring_descriptor ring_make(const struct ring *ring, uint64_t slot, uint64_t generation)
{
	struct ring_descriptor d = { .identity = RING_MAGIC ^ slot, .generation = generation };

	d.payload = toy_mix(ring->seed + generation * PAGE_STRIDE + slot);
	d.check = toy_mix(d.payload ^ d.identity * PAGE_STRIDE ^ generation);
	return d;
}

static struct ring_descriptor *ring_at(const struct ring *ring, uint64_t slot)
{
	return (struct ring_descriptor *)(uintptr_t)ring->base + slot;
}

static uint64_t ring_generation(const struct ring *ring, uint64_t slot)
{
	return ring->head / ring->slots + (slot < ring->head % ring->slots);
}

void ring_init(struct ring *ring, uint64_t base, uint64_t pages, uint64_t seed, uint64_t rate,
	       uint64_t dirty, uint64_t first_page)
{
	memset(ring, 0, sizeof(*ring));
	gate_init(&ring->gate);
	ring->base = base;
	ring->slots = pages * RING_PER_PAGE;
	ring->seed = seed;
	ring->rate = rate;
	ring->dirty = dirty;
	ring->first_page = first_page;
}

void ring_fill(struct ring *ring)
{
	uint64_t slot;

	for (slot = 0; slot < ring->slots; slot++)
		*ring_at(ring, slot) = ring_make(ring, slot, 0);
}

/* Data first, then the dirty bit: a sync that misses the bit took its page before the data changed. */
static void ring_mark_dirty(const struct ring *ring, uint64_t slot)
{
	uint64_t page = ring->first_page + slot / RING_PER_PAGE;
	uint64_t *map = (uint64_t *)(uintptr_t)ring->dirty;

	if (map)
		__atomic_fetch_or(&map[page / 64], 1ull << (page % 64), __ATOMIC_RELEASE);
}

/* False when the gate closed; then nothing was written. */
static bool ring_write_next(struct ring *ring)
{
	uint64_t slot = ring->head % ring->slots;
	struct ring_descriptor *d = ring_at(ring, slot);

	guard_open(&ring->guard);
	if (!gate_is_open(&ring->gate)) {
		guard_close(&ring->guard);
		return false;
	}
	guard_touch_write(d);
	guard_close(&ring->guard);
	*d = ring_make(ring, slot, ring->head / ring->slots + 1);
	ring_mark_dirty(ring, slot);
	__atomic_store_n(&ring->head, ring->head + 1, __ATOMIC_RELAXED);
	return true;
}

static void ring_run(struct ring *ring)
{
	__atomic_store_n(&ring->status, VCPU_READY, __ATOMIC_RELAXED);
	guard_enter(&ring->guard);
	switch (sigsetjmp(ring->guard.env, 0)) {
	case GUARD_ENTERED:
		while (pace_next(&ring->pace, &ring->gate, ring->rate) && ring_write_next(ring))
			;
		break;
	case GUARD_LOST:
		ring->lost_address = ring->guard.lost_address;
		__atomic_store_n(&ring->status, VCPU_LOST_PAGE, __ATOMIC_RELEASE);
		gate_park_self(&ring->gate);
		break;
	default:
		break;
	}
	guard_leave(&ring->guard);
}

int ring_serve(struct ring *ring)
{
	gate_enter(&ring->gate);
	while (gate_wait(&ring->gate) == GATE_RUN)
		ring_run(ring);
	return 0;
}

void ring_go(struct ring *ring)
{
	gate_go(&ring->gate);
}

void ring_halt(struct ring *ring)
{
	gate_halt(&ring->gate, NULL);
}

void ring_quit(struct ring *ring)
{
	gate_quit(&ring->gate);
}

uint64_t ring_verify(const struct ring *ring, const void *bytes, uint64_t first, uint64_t count)
{
	uint64_t i;

	for (i = 0; i < count; i++) {
		struct ring_descriptor expected =
			ring_make(ring, first + i, ring_generation(ring, first + i));

		if (memcmp((const char *)bytes + i * sizeof(expected), &expected, sizeof(expected)))
			break;
	}
	return i;
}

struct ring_cursor {
	uint64_t page;
	uint32_t errors;
	uint32_t block;
	struct toy_bad *bad;
	uint32_t bad_room;
};

static void ring_record(struct ring *ring, struct ring_cursor *at, enum toy_damage damage,
			uint64_t expected, uint64_t found)
{
	if (at->errors < at->bad_room)
		at->bad[at->errors] = (struct toy_bad){
			.damage = damage, .block = at->block, .page = ring->first_page + at->page,
			.expected = expected, .found = found,
		};
	at->errors++;
}

static void ring_sweep_on(struct ring *ring, struct ring_cursor *at)
{
	for (; at->page < ring->slots / RING_PER_PAGE; at->page++) {
		uint64_t first = at->page * RING_PER_PAGE, good;

		guard_open(&ring->guard);
		guard_touch_read(ring_at(ring, first));
		guard_close(&ring->guard);
		good = ring_verify(ring, ring_at(ring, first), first, RING_PER_PAGE);
		if (good < RING_PER_PAGE)
			ring_record(ring, at, DAMAGE_RING, ring_generation(ring, first + good),
				    ring_at(ring, first + good)->generation);
	}
}

int64_t ring_sweep(struct ring *ring, uint32_t block, struct toy_bad *bad, uint32_t bad_room)
{
	/* volatile pointer: the cursor lives in memory, not in a register a jump would lose */
	struct ring_cursor cursor = { .block = block, .bad = bad, .bad_room = bad_room };
	struct ring_cursor *volatile at = &cursor;

	guard_enter(&ring->guard);
	if (sigsetjmp(ring->guard.env, 0) == GUARD_LOST) {
		ring_record(ring, at, DAMAGE_LOST, 0, ring->guard.lost_address);
		at->page++;
	}
	ring_sweep_on(ring, at);
	guard_leave(&ring->guard);
	return at->errors;
}
