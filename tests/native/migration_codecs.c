// SPDX-License-Identifier: MIT
/* Codecs: round trips, and garbage in guarded buffers. */
#define _GNU_SOURCE
#include "migration_rig.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "crc32c.h"
#include "pagesum.h"
#include "xbzrle.h"

static uint64_t rng = 88172645463325252u;

uint64_t rig_random(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	return rng ^= rng << 17;
}

void rig_noise(uint8_t *to, size_t n)
{
	while (n--)
		*to++ = (uint8_t)rig_random();
}

/* n bytes that end where an unreadable page begins. */
static uint8_t *guarded(size_t n)
{
	size_t pages = (n + PAGE - 1) / PAGE + 1;
	uint8_t *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED && !mprotect(p + (pages - 1) * PAGE, PAGE, PROT_NONE));
	return p + (pages - 1) * PAGE - n;
}

static void unguard(uint8_t *p, size_t n)
{
	size_t pages = (n + PAGE - 1) / PAGE + 1;

	munmap(p + n - (pages - 1) * PAGE, pages * PAGE);
}

static void test_crc32c(void)
{
	uint8_t buf[300];

	CHECK(crc32c(0, "123456789", 9) == 0xe3069283);	/* RFC 3720's check value */
	for (size_t n = 0; n <= sizeof(buf); n++) {
		uint32_t seed = (uint32_t)rig_random();

		rig_noise(buf, n);
		CHECK(crc32c(seed, buf, n) == crc32c_portable(seed, buf, n));
		CHECK(crc32c(crc32c(seed, buf, n / 3), buf + n / 3, n - n / 3) == crc32c(seed, buf, n));
	}
}

static void test_pagesum(void)
{
	uint8_t *ram = guarded(3 * PAGE);
	uint32_t with_hole;

	rig_noise(ram, 3 * PAGE);
	memset(ram + PAGE, 0, PAGE);
	with_hole = crc32c_pages(ram, 0, 3 * PAGE, 0);
	CHECK(crc32c_pages(ram, PAGE, 3 * PAGE, crc32c_pages(ram, 0, PAGE, 0)) == with_hole);
	ram[PAGE + 17] = 1;
	CHECK(crc32c_pages(ram, 0, 3 * PAGE, 0) != with_hole);
	unguard(ram, 3 * PAGE);
}

static void test_xbzrle_round(void)
{
	uint8_t *old = guarded(PAGE), *new = guarded(PAGE), *out = guarded(PAGE), *page = guarded(PAGE);

	for (int round = 0; round < 3000; round++) {
		unsigned int edits = (unsigned int)(rig_random() % 40);
		size_t cap = rig_random() % 2 ? PAGE : rig_random() % 200;
		int n;

		rig_noise(old, PAGE);
		memcpy(new, old, PAGE);
		while (edits--) {
			size_t at = rig_random() % PAGE, len = rig_random() % 120;

			rig_noise(new + at, len < PAGE - at ? len : PAGE - at);
		}
		n = xbzrle_encode(old, new, PAGE, out + PAGE - cap, cap);
		CHECK(n == -EOVERFLOW || (n >= 0 && (size_t)n <= cap));
		CHECK((n == 0) == !memcmp(old, new, PAGE));
		if (n <= 0)
			continue;
		memcpy(page, old, PAGE);
		CHECK(xbzrle_decode(out + PAGE - cap, (size_t)n, page, PAGE) == 0);
		CHECK(!memcmp(page, new, PAGE));
	}
	unguard(old, PAGE);
	unguard(new, PAGE);
	unguard(out, PAGE);
	unguard(page, PAGE);
}

/* Any bytes: applied or refused, never read or written beyond either end. */
static void test_xbzrle_garbage(void)
{
	uint8_t *page = guarded(PAGE);

	for (int round = 0; round < 20000; round++) {
		size_t n = rig_random() % 64;
		uint8_t *in = guarded(n);
		int ret;

		rig_noise(in, n);
		for (size_t i = 0; i < n && rig_random() % 3; i += 2)
			in[i] &= 0x9f;
		ret = xbzrle_decode(in, n, page, PAGE);
		CHECK(ret == 0 || ret == -EINVAL);
		unguard(in, n);
	}
	unguard(page, PAGE);
}

static void test_ramrec(void)
{
	static const uint32_t kinds[] = { RAM_FLAG_PAGE, RAM_FLAG_ZERO };
	uint8_t buf[RAM_HEAD_MAX + 8];
	char id[256];

	memset(id, 'x', sizeof(id));
	for (unsigned int id_len = 0; id_len < 256; id_len++) {
		uint32_t kind = kinds[id_len % 2];
		uint64_t offset = (rig_random() >> 12) << 12;
		struct ramrec r;
		size_t n = ramrec_encode(buf, offset, kind, id_len ? id : NULL, (uint8_t)id_len);

		buf[n] = 0;
		n += kind == RAM_FLAG_ZERO;
		for (size_t len = 0; len < n; len++)
			CHECK(ramrec_decode(buf, len, &r) == 0);
		CHECK(ramrec_decode(buf, n, &r) == 1);
		CHECK(r.offset == offset && r.kind == kind && r.has_id == !!id_len && r.id_len == id_len);
		CHECK(r.head_len == n && r.payload_len == (kind == RAM_FLAG_PAGE ? PAGE : 0));
	}
}

/* Whatever is decoded stays inside what was given, and no answer changes when more bytes follow. */
static void test_ramrec_garbage(void)
{
	for (int round = 0; round < 50000; round++) {
		size_t n = rig_random() % (RAM_HEAD_MAX + 1);
		uint8_t *buf = guarded(n);
		struct ramrec r, again;
		int ret, more;

		rig_noise(buf, n);
		if (n >= 8 && rig_random() % 2) {	/* one flag that exists */
			buf[6] = (uint8_t)(buf[6] & 0xf0) | (uint8_t)(rig_random() % 4);
			buf[7] = (uint8_t)(1u << rig_random() % 8);
		}
		ret = ramrec_decode(buf, n, &r);
		CHECK(ret == 0 || ret == 1 || ret == -EINVAL);
		if (ret == 1) {
			CHECK(r.head_len <= n && r.head_len <= RAM_HEAD_MAX);
			CHECK(!r.has_id || r.id_at + r.id_len <= r.head_len);
		}
		for (size_t less = 0; less < n; less++) {
			more = ramrec_decode(buf, less, &again);
			CHECK(more == 0 || more == ret);
		}
		unguard(buf, n);
	}
}

void codecs_run(void)
{
	test_crc32c();
	test_pagesum();
	test_xbzrle_round();
	test_xbzrle_garbage();
	test_ramrec();
	test_ramrec_garbage();
}
