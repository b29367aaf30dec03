#include "crc32c.h"

#include <string.h>

/* Nibble tables keep the portable form free of run-time set-up (and of global state). */
uint32_t crc32c_portable(uint32_t crc, const void *data, size_t len)
{
	static const uint32_t nibble[16] = {
		0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1,
		0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
		0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9,
		0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
	};
	const uint8_t *p = data;

	crc = ~crc;
	while (len--) {
		crc ^= *p++;
		crc = (crc >> 4) ^ nibble[crc & 15];
		crc = (crc >> 4) ^ nibble[crc & 15];
	}
	return ~crc;
}

#if defined(__x86_64__)

/* One lane moves 8 bytes per 3 cycles, the latency of the instruction. */
__attribute__((target("sse4.2")))
static uint32_t crc32c_sse42(uint32_t crc, const void *data, size_t len)
{
	const uint8_t *p = data;
	uint64_t c = (uint32_t)~crc;

	while (len >= 8) {
		uint64_t v;

		memcpy(&v, p, 8);
		c = __builtin_ia32_crc32di(c, v);
		p += 8;
		len -= 8;
	}
	while (len--)
		c = __builtin_ia32_crc32qi((uint32_t)c, *p++);
	return ~(uint32_t)c;
}

/*
 * The instruction takes 3 cycles but a new one can start in each: three lanes side by side hide the
 * latency. A lane's value is carried over the lanes behind it by multiplying with x^(8 n), n the bytes
 * it passes over. The carry-less product of two bit-reflected values is short of one factor x, and
 * feeding it to the instruction multiplies by x^32: hence x^(8 n - 33) below.
 */
#define LANE 1024u
#define PAST_TWO_LANES 0xa51b6135u	/* x^(8 * 2 * LANE - 33) mod P, bit-reflected */
#define PAST_ONE_LANE 0x170076fau	/* x^(8 * LANE - 33) mod P */

__attribute__((target("sse4.2,pclmul")))
static uint64_t three_lanes(uint64_t c, const uint8_t *p)
{
	typedef long long v2di __attribute__((vector_size(16)));
	const v2di two = { PAST_TWO_LANES, 0 }, one = { PAST_ONE_LANE, 0 };
	uint64_t a = c, b = 0, d = 0;
	v2di va, vb;

	for (size_t at = 0; at < LANE; at += 8) {
		uint64_t x, y, z;

		memcpy(&x, p + at, 8);
		memcpy(&y, p + LANE + at, 8);
		memcpy(&z, p + 2 * LANE + at, 8);
		a = __builtin_ia32_crc32di(a, x);
		b = __builtin_ia32_crc32di(b, y);
		d = __builtin_ia32_crc32di(d, z);
	}
	va = (v2di){ (long long)a, 0 };
	vb = (v2di){ (long long)b, 0 };
	va = __builtin_ia32_pclmulqdq128(va, two, 0);
	vb = __builtin_ia32_pclmulqdq128(vb, one, 0);
	return __builtin_ia32_crc32di(0, (uint64_t)(va[0] ^ vb[0])) ^ d;
}

__attribute__((target("sse4.2,pclmul")))
static uint32_t crc32c_lanes(uint32_t crc, const void *data, size_t len)
{
	const uint8_t *p = data;
	uint64_t c = (uint32_t)~crc;

	for (; len >= 3 * LANE; p += 3 * LANE, len -= 3 * LANE)
		c = three_lanes(c, p);
	return crc32c_sse42(~(uint32_t)c, p, len);
}

uint32_t crc32c(uint32_t crc, const void *data, size_t len)
{
	if (len >= 3 * LANE && __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul"))
		return crc32c_lanes(crc, data, len);
	if (__builtin_cpu_supports("sse4.2"))
		return crc32c_sse42(crc, data, len);
	return crc32c_portable(crc, data, len);
}

#else

uint32_t crc32c(uint32_t crc, const void *data, size_t len)
{
	return crc32c_portable(crc, data, len);
}

#endif
