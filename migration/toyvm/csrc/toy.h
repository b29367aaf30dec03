/* SPDX-License-Identifier: MIT */
/*
 * What the toy guest's code agrees on, whoever runs it.
 *
 * The same inline functions are compiled twice: into the native vCPU threads, and into the guest
 * program that real KVM vCPUs run. So nothing here calls a library, owns memory or knows an address:
 * whoever runs the code brings a `toy_view` with the addresses as that runner sees them.
 */
#ifndef TOYVM_TOY_H
#define TOYVM_TOY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The guest program must be self-contained: its build asks for attributes of its own. */
#ifndef TOY_INLINE
#define TOY_INLINE static inline __attribute__((always_inline))
#endif

#define TOY_PAGE_BYTES 4096u
#define TOY_PAGE_WORDS (TOY_PAGE_BYTES / 8)
#define TOY_MAX_BLOCKS 8u
#define TOY_MAX_SMP 64u
#define TOY_MAX_BAD 8u

/* Where the oracle's pages lie. Both sides of a migration have the same one. */
struct toy_layout {
	uint64_t seed;
	uint64_t working_set;                   /* the vCPUs touch global indices [0, working_set) */
	uint32_t smp;                           /* vCPU i owns the indices with index % smp == i */
	uint32_t block_count;
	uint64_t page_count[TOY_MAX_BLOCKS];    /* target pages of each block */
	uint64_t filled[TOY_MAX_BLOCKS];        /* oracle pages, at the start of each block */
	uint64_t first[TOY_MAX_BLOCKS + 1];     /* global index of each block's first oracle page */
};

/* Addresses as one runner sees them; 0 = not there. */
struct toy_view {
	uint64_t base[TOY_MAX_BLOCKS];
	uint64_t received[TOY_MAX_BLOCKS];      /* uint64_t words, bit per target page; may be 0 */
	uint64_t log;                           /* uint32_t expected counter per slot of this vCPU */
	uint64_t state;                         /* struct toy_state */
	uint64_t layout;                        /* struct toy_layout */
	uint64_t workload;                      /* struct toy_workload */
};

enum toy_kind { TOY_SEQUENTIAL, TOY_RANDOM, TOY_ZIPF, TOY_CHASE, TOY_KINDS };

struct toy_workload {
	uint32_t kind;
	uint32_t write_share;                   /* of 65536 */
	uint64_t rate;                          /* operations per second and vCPU; 0 = unlimited */
	uint64_t stop_at;                       /* a vCPU parks itself after so many operations; 0 = never */
};

enum toy_damage {
	DAMAGE_NONE,
	DAMAGE_ZEROED,                          /* an oracle page reads as zeros */
	DAMAGE_MISPLACED,                       /* the bytes of another page of ours */
	DAMAGE_IDENTITY,                        /* no identity at all */
	DAMAGE_CHECK,                           /* counter and check value do not belong together */
	DAMAGE_TORN,                            /* head and tail of different ages */
	DAMAGE_STALE,                           /* older than the log says: lost or rolled-back writes */
	DAMAGE_FUTURE,                          /* newer than the log says */
	DAMAGE_LINK,                            /* the pointer-chase link */
	DAMAGE_BODY,                            /* the constant pattern */
	DAMAGE_NOT_ZERO,                        /* a page never filled is not all zeros */
	DAMAGE_LOST,                            /* reading it raised SIGBUS */
	DAMAGE_RING,                            /* a ring descriptor */
	DAMAGE_KINDS,
};

struct toy_bad {
	uint32_t damage;
	uint32_t block;
	uint64_t page;                          /* target page within the block */
	uint64_t expected;
	uint64_t found;
};

/* Log-linear: 32 buckets to an octave (3 % wide), exact below 32 ns, up to 2^41 ns. */
#define HISTOGRAM_SUB_BITS 5u
#define HISTOGRAM_SUB (1u << HISTOGRAM_SUB_BITS)
#define HISTOGRAM_TOP_BIT 40u
#define HISTOGRAM_BUCKETS ((HISTOGRAM_TOP_BIT - HISTOGRAM_SUB_BITS + 2) * HISTOGRAM_SUB)

struct toy_histogram {
	uint64_t count;
	uint64_t sum_ns;
	uint64_t max_ns;
	uint32_t bucket[HISTOGRAM_BUCKETS];
};

/* Where in an operation a vCPU is. Only in PHASE_MODIFY may it not be parked. */
enum toy_phase { PHASE_IDLE, PHASE_PROBE, PHASE_MODIFY };

/* A vCPU's own state, outside guest RAM and carried along as device state. It changes only when an
 * operation is complete, so an operation given up in its probe is simply begun again. */
struct toy_state {
	uint64_t rng;
	uint64_t position;                      /* slot of the last touch (sequential, chase) */
	uint64_t ops;
	uint64_t writes;
	uint64_t hits;                          /* touches of received pages while a bitmap was attached */
	uint64_t misses;                        /* touches of pages not yet received, timed */
	uint64_t errors;                        /* touches that found damage */
	uint64_t bad_count;
	struct toy_bad bad[TOY_MAX_BAD];        /* the first of them */
	struct toy_histogram latency;
	/* not carried along */
	uint64_t phase;
	uint64_t probe_clock;                   /* runner's clock before a timed probe; 0 outside one */
	uint64_t first_clock;                   /* runner's clock after the first operation since the start */
};

_Static_assert(sizeof(struct toy_bad) == 32, "toy_bad crosses the Python border");
_Static_assert(sizeof(struct toy_histogram) == 24 + 4 * HISTOGRAM_BUCKETS, "histogram has padding");

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit. */
TOY_INLINE uint64_t toy_mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xBF58476D1CE4E5B9ull;
	x ^= x >> 27;
	x *= 0x94D049BB133111EBull;
	return x ^ (x >> 31);
}

/* Counters that Python reads while the vCPU runs. One writer, so no locked instruction is needed. */
TOY_INLINE void toy_store(uint64_t *p, uint64_t value)
{
	__atomic_store_n(p, value, __ATOMIC_RELAXED);
}

TOY_INLINE void toy_add(uint64_t *p, uint64_t n)
{
	__atomic_store_n(p, *p + n, __ATOMIC_RELAXED);
}

#endif
