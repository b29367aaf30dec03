// SPDX-License-Identifier: MIT
#include "bitmap.h"

#define WORD_BITS 64

/* Bits [lo, hi) of one word; 0 <= lo < hi <= 64. */
static uint64_t word_mask(unsigned int lo, unsigned int hi)
{
	return (~UINT64_C(0) << lo) & (~UINT64_C(0) >> (WORD_BITS - hi));
}

/* Portable: the popcnt instruction is not in the x86-64 baseline we compile for. */
static unsigned int popcount64(uint64_t v)
{
	v -= (v >> 1) & UINT64_C(0x5555555555555555);
	v = (v & UINT64_C(0x3333333333333333)) + ((v >> 2) & UINT64_C(0x3333333333333333));
	v = (v + (v >> 4)) & UINT64_C(0x0f0f0f0f0f0f0f0f);
	return (v * UINT64_C(0x0101010101010101)) >> 56;
}

static uint64_t load(const uint64_t *map, uint64_t word)
{
	return __atomic_load_n(&map[word], __ATOMIC_RELAXED);
}

/* Walks the words a bit range touches; mask has the range's bits of the word at hand. */
struct span {
	uint64_t bit, end, word, mask;
};

static bool span_next(struct span *s)
{
	unsigned int lo, hi;

	if (s->bit >= s->end)
		return false;
	lo = s->bit % WORD_BITS;
	hi = s->end - s->bit < WORD_BITS - lo ? lo + (s->end - s->bit) : WORD_BITS;
	s->word = s->bit / WORD_BITS;
	s->mask = word_mask(lo, hi);
	s->bit += hi - lo;
	return true;
}

#define for_each_word(s, start, count) \
	for (struct span s = { (start), (start) + (count), 0, 0 }; span_next(&s);)

void bitmap_set(uint64_t *map, uint64_t start, uint64_t count)
{
	for_each_word(s, start, count)
		map[s.word] |= s.mask;
}

void bitmap_clear(uint64_t *map, uint64_t start, uint64_t count)
{
	for_each_word(s, start, count)
		map[s.word] &= ~s.mask;
}

bool bitmap_test(const uint64_t *map, uint64_t bit)
{
	return load(map, bit / WORD_BITS) >> (bit % WORD_BITS) & 1;
}

bool bitmap_test_acquire(const uint64_t *map, uint64_t bit)
{
	return __atomic_load_n(&map[bit / WORD_BITS], __ATOMIC_ACQUIRE) >> (bit % WORD_BITS) & 1;
}

bool bitmap_test_and_set(uint64_t *map, uint64_t bit)
{
	uint64_t mask = UINT64_C(1) << (bit % WORD_BITS);

	return __atomic_fetch_or(&map[bit / WORD_BITS], mask, __ATOMIC_ACQ_REL) & mask;
}

bool bitmap_test_and_clear(uint64_t *map, uint64_t bit)
{
	uint64_t mask = UINT64_C(1) << (bit % WORD_BITS);

	return __atomic_fetch_and(&map[bit / WORD_BITS], ~mask, __ATOMIC_ACQ_REL) & mask;
}

void bitmap_set_atomic(uint64_t *map, uint64_t start, uint64_t count)
{
	for_each_word(s, start, count)
		__atomic_fetch_or(&map[s.word], s.mask, __ATOMIC_RELEASE);
}

void bitmap_clear_atomic(uint64_t *map, uint64_t start, uint64_t count)
{
	for_each_word(s, start, count)
		__atomic_fetch_and(&map[s.word], ~s.mask, __ATOMIC_RELEASE);
}

/* Set bits of one word; how many of them are new. */
static unsigned int set_word(uint64_t *map, uint64_t word, uint64_t bits)
{
	if (!bits)
		return 0;
	return popcount64(bits & ~__atomic_fetch_or(&map[word], bits, __ATOMIC_ACQ_REL));
}

uint64_t bitmap_set_count(uint64_t *map, uint64_t start, uint64_t count)
{
	uint64_t fresh = 0;

	for_each_word(s, start, count)
		fresh += set_word(map, s.word, s.mask);
	return fresh;
}

/* First bit at or after from whose value differs from the flipped-away one. */
static uint64_t next_bit(const uint64_t *map, uint64_t nbits, uint64_t from, uint64_t flip)
{
	uint64_t word, bits, bit;

	if (from >= nbits)
		return nbits;
	word = from / WORD_BITS;
	bits = (load(map, word) ^ flip) & (~UINT64_C(0) << (from % WORD_BITS));
	while (!bits) {
		if (++word >= BITMAP_WORDS(nbits))
			return nbits;
		bits = load(map, word) ^ flip;
	}
	bit = word * WORD_BITS + __builtin_ctzll(bits);
	return bit < nbits ? bit : nbits;
}

uint64_t bitmap_next_set(const uint64_t *map, uint64_t nbits, uint64_t from)
{
	return next_bit(map, nbits, from, 0);
}

uint64_t bitmap_next_clear(const uint64_t *map, uint64_t nbits, uint64_t from)
{
	return next_bit(map, nbits, from, ~UINT64_C(0));
}

uint64_t bitmap_next_run(const uint64_t *map, uint64_t nbits, uint64_t from, uint64_t *start)
{
	*start = bitmap_next_set(map, nbits, from);
	return bitmap_next_clear(map, nbits, *start) - *start;
}

uint64_t bitmap_count(const uint64_t *map, uint64_t start, uint64_t count)
{
	uint64_t total = 0;

	for_each_word(s, start, count)
		total += popcount64(load(map, s.word) & s.mask);
	return total;
}

void bitmap_or(uint64_t *dst, const uint64_t *src, uint64_t nbits)
{
	for_each_word(s, 0, nbits)
		dst[s.word] |= load(src, s.word) & s.mask;
}

uint64_t bitmap_or_count(uint64_t *dst, const uint64_t *src, uint64_t nbits)
{
	uint64_t fresh = 0;

	for_each_word(s, 0, nbits)
		fresh += set_word(dst, s.word, load(src, s.word) & s.mask);
	return fresh;
}

uint64_t bitmap_or_at(uint64_t *dst, uint64_t start, const uint64_t *src, uint64_t nbits)
{
	uint64_t fresh = 0, bit = 0, length;

	for (; (length = bitmap_next_run(src, nbits, bit, &bit)) != 0; bit += length)
		fresh += bitmap_set_count(dst, start + bit, length);
	return fresh;
}

uint64_t bitmap_take(uint64_t *dst, uint64_t *src, uint64_t nbits)
{
	uint64_t fresh = 0;

	for (uint64_t word = 0; word < BITMAP_WORDS(nbits); word++) {
		if (!load(src, word))
			continue;
		fresh += set_word(dst, word, __atomic_exchange_n(&src[word], 0, __ATOMIC_ACQ_REL));
	}
	return fresh;
}

void bitmap_andnot(uint64_t *dst, const uint64_t *src, uint64_t nbits)
{
	for_each_word(s, 0, nbits)
		dst[s.word] &= ~(load(src, s.word) & s.mask);
}

void bitmap_complement(uint64_t *dst, const uint64_t *src, uint64_t nbits)
{
	for_each_word(s, 0, nbits)
		dst[s.word] = ~load(src, s.word) & s.mask;
}

void bitmap_widen(uint64_t *map, uint64_t nbits, uint64_t unit)
{
	uint64_t bit = 0;

	if (unit <= 1)
		return;
	while ((bit = bitmap_next_set(map, nbits, bit)) < nbits) {
		uint64_t first = bit & ~(unit - 1);

		bit = unit < nbits - first ? first + unit : nbits;
		bitmap_set(map, first, bit - first);
	}
}
