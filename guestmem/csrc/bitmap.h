/* SPDX-License-Identifier: MIT */
/*
 * Bitmaps of target pages.
 *
 * Bit i is bit (i & 63) of the 64-bit word i / 64. A map of n bits is BITMAP_WORDS(n)
 * words, zeroed by its owner; the bits past n in the last word are never set by the
 * functions that know n, and callers never set them.
 *
 * Who may touch a map at the same time: the _atomic, _count and test_and_ functions, take
 * on its source, and every function that only reads may run on one map from many threads.
 * The plain writers (set, clear, or, andnot, complement, widen) need the map they write to
 * themselves.
 */
#ifndef GUESTMEM_BITMAP_H
#define GUESTMEM_BITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BITMAP_WORDS(nbits) (((uint64_t)(nbits) + 63) / 64)

void bitmap_set(uint64_t *map, uint64_t start, uint64_t count);
void bitmap_clear(uint64_t *map, uint64_t start, uint64_t count);

/* Relaxed: says what the bit was, orders nothing. */
bool bitmap_test(const uint64_t *map, uint64_t bit);
/* Acquire: whoever sees a bit that bitmap_set_atomic() set also sees what was done before it. */
bool bitmap_test_acquire(const uint64_t *map, uint64_t bit);
/* Atomic, acquire and release; both return the old value. */
bool bitmap_test_and_set(uint64_t *map, uint64_t bit);
bool bitmap_test_and_clear(uint64_t *map, uint64_t bit);
/* Atomic word by word, release; not one atomic step for the whole range. */
void bitmap_set_atomic(uint64_t *map, uint64_t start, uint64_t count);
void bitmap_clear_atomic(uint64_t *map, uint64_t start, uint64_t count);
/* Like bitmap_set_atomic; returns how many of the bits were clear before. */
uint64_t bitmap_set_count(uint64_t *map, uint64_t start, uint64_t count);

/* First set (clear) bit at or after from; nbits when there is none. */
uint64_t bitmap_next_set(const uint64_t *map, uint64_t nbits, uint64_t from);
uint64_t bitmap_next_clear(const uint64_t *map, uint64_t nbits, uint64_t from);
/* Length of the first run of set bits at or after from, 0 when there is none. */
uint64_t bitmap_next_run(const uint64_t *map, uint64_t nbits, uint64_t from, uint64_t *start);
uint64_t bitmap_count(const uint64_t *map, uint64_t start, uint64_t count);

/* dst |= src, dst &= ~src and dst = ~src over nbits; dst == src is allowed. */
void bitmap_or(uint64_t *dst, const uint64_t *src, uint64_t nbits);
void bitmap_andnot(uint64_t *dst, const uint64_t *src, uint64_t nbits);
void bitmap_complement(uint64_t *dst, const uint64_t *src, uint64_t nbits);
/* Like bitmap_or, atomic per word of dst; returns how many bits are new in dst. */
uint64_t bitmap_or_count(uint64_t *dst, const uint64_t *src, uint64_t nbits);
/* The same with src's bit 0 at dst's bit start. */
uint64_t bitmap_or_at(uint64_t *dst, uint64_t start, const uint64_t *src, uint64_t nbits);
/*
 * Move src's bits into dst, both atomically per word: a bit set in src meanwhile ends in
 * exactly one of the two. Returns how many bits are new in dst.
 */
uint64_t bitmap_take(uint64_t *dst, uint64_t *src, uint64_t nbits);
/* Any bit set in a unit (a power of two of bits, counted from bit 0) sets the whole unit. */
void bitmap_widen(uint64_t *map, uint64_t nbits, uint64_t unit);

#endif
