// SPDX-License-Identifier: MIT
#include "zero.h"

#include <stdint.h>
#include <string.h>

/* Guest RAM may change under the reader (zero.h); that is not a bug to report. */
#if defined(__SANITIZE_THREAD__)
#define RACY __attribute__((no_sanitize("thread"), noinline))
#else
#define RACY
#endif

RACY static uint64_t load_u64(const unsigned char *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define SIMD_BLOCK 128

/* blocks * 128 bytes; SSE2 is in the x86-64 baseline. */
RACY static bool blocks_zero_sse2(const unsigned char *p, size_t blocks)
{
	const __m128i zero = _mm_setzero_si128();

	for (; blocks; blocks--, p += SIMD_BLOCK) {
		const __m128i *v = (const __m128i *)p;
		__m128i a = _mm_or_si128(_mm_loadu_si128(v), _mm_loadu_si128(v + 1));
		__m128i b = _mm_or_si128(_mm_loadu_si128(v + 2), _mm_loadu_si128(v + 3));
		__m128i c = _mm_or_si128(_mm_loadu_si128(v + 4), _mm_loadu_si128(v + 5));
		__m128i d = _mm_or_si128(_mm_loadu_si128(v + 6), _mm_loadu_si128(v + 7));

		a = _mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d));
		if (_mm_movemask_epi8(_mm_cmpeq_epi8(a, zero)) != 0xffff)
			return false;
	}
	return true;
}

__attribute__((target("avx2")))
RACY static bool blocks_zero_avx2(const unsigned char *p, size_t blocks)
{
	for (; blocks; blocks--, p += SIMD_BLOCK) {
		const __m256i *v = (const __m256i *)p;
		__m256i a = _mm256_or_si256(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1));
		__m256i b = _mm256_or_si256(_mm256_loadu_si256(v + 2), _mm256_loadu_si256(v + 3));

		a = _mm256_or_si256(a, b);
		if (!_mm256_testz_si256(a, a))
			return false;
	}
	return true;
}

static bool blocks_zero(const unsigned char *p, size_t blocks)
{
	if (__builtin_cpu_supports("avx2"))
		return blocks_zero_avx2(p, blocks);
	return blocks_zero_sse2(p, blocks);
}
#else
#define SIMD_BLOCK 64

RACY static bool blocks_zero(const unsigned char *p, size_t blocks)
{
	for (; blocks; blocks--, p += SIMD_BLOCK) {
		uint64_t v = 0;

		for (size_t i = 0; i < SIMD_BLOCK; i += sizeof(v))
			v |= load_u64(p + i);
		if (v)
			return false;
	}
	return true;
}
#endif

RACY static bool bytes_zero(const unsigned char *p, size_t len)
{
	unsigned char v = 0;

	while (len--)
		v |= *p++;
	return !v;
}

bool buffer_is_zero(const void *buffer, size_t len)
{
	const unsigned char *p = buffer;
	size_t blocks = len / SIMD_BLOCK;

	if (len < sizeof(uint64_t))
		return bytes_zero(p, len);
	/* Most pages with data show it at an end or in the middle: three loads settle them. */
	if (load_u64(p) || load_u64(p + len / 2 - len / 2 % 8) || load_u64(p + len - 8))
		return false;
	return blocks_zero(p, blocks) &&
	       bytes_zero(p + blocks * SIMD_BLOCK, len % SIMD_BLOCK);
}
