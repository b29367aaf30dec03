/* SPDX-License-Identifier: MIT */
/*
 * A descriptor ring in guest RAM, rewritten by the device's own thread until the guest stops.
 *
 * How often each slot was written follows from the head alone, so the head, carried as device state,
 * proves every descriptor: a stale or torn one cannot pass.
 */
#ifndef TOYVM_RING_H
#define TOYVM_RING_H

#include "gate.h"
#include "guard.h"
#include "pace.h"
#include "toy.h"

#define RING_MAGIC 0x52494E4744455343ull

struct ring_descriptor {
	uint64_t identity;                      /* magic ^ slot */
	uint64_t generation;                    /* how often the slot was written */
	uint64_t payload;
	uint64_t check;
};

#define RING_PER_PAGE (TOY_PAGE_BYTES / sizeof(struct ring_descriptor))

_Static_assert(sizeof(struct ring_descriptor) == 32, "descriptors tile a page");

struct ring {
	struct gate gate;
	struct guard guard;
	struct pace pace;
	uint64_t base;                          /* host address of the first descriptor, page aligned */
	uint64_t slots;
	uint64_t head;                          /* descriptors written so far; only while parked from outside */
	uint64_t seed;
	uint64_t rate;                          /* descriptors per second; 0 = unlimited */
	uint64_t dirty;                         /* uint64_t words of the block's VMM-write bitmap; 0 = none */
	uint64_t first_page;                    /* the ring's first target page within the block */
	uint32_t status;                        /* enum vcpu_status */
	uint32_t pad;
	uint64_t lost_address;
};

void ring_init(struct ring *ring, uint64_t base, uint64_t pages, uint64_t seed, uint64_t rate,
	       uint64_t dirty, uint64_t first_page);

/* Writes generation 0 into every slot. */
void ring_fill(struct ring *ring);

int ring_serve(struct ring *ring);
void ring_go(struct ring *ring);
void ring_halt(struct ring *ring);
void ring_quit(struct ring *ring);

/* Judges `count` descriptors copied out of the ring, from slot `first` on. Returns the index of the first
 * bad one within `bytes`, or count. */
uint64_t ring_verify(const struct ring *ring, const void *bytes, uint64_t first, uint64_t count);

/* Every page of the ring, in place; bad pages recorded as the oracle's sweep does. The guest must not run. */
int64_t ring_sweep(struct ring *ring, uint32_t block, struct toy_bad *bad, uint32_t bad_room);

#endif
