// SPDX-License-Identifier: MIT
/* sources: migration/native/csrc/[a-z]*.c uffd/csrc/uffd.c uffd/csrc/pending.c guestmem/csrc/bitmap.c
	guestmem/csrc/zero.c */
/*
 * The destination's readers fed any bytes. The first byte chooses: framed or not, before LISTEN, stored or
 * placed by a real userfaultfd (where this host has one), the preempt channel. Blocks stand between
 * unreadable pages; one of them has host pages of four target pages.
 */
#include "fuzz_feed.h"

#include "bitmap.h"
#include "dst.h"
#include "uffd.h"
#include "uffd_abi.h"

#include <linux/userfaultfd.h>

#define SECTION 0x01020304u	/* easy to find for a mutator that copies its own bytes */
enum { FRAMED = 1, BEFORE_LISTEN = 2, PLACED = 4, URGENT = 8 };

static struct block {
	const char *id;
	uint64_t bytes, page_size;
	uint8_t *host;
	uint64_t received[1], requested[1];
} blocks[] = { { "a", 16 << 12, 1 << 12, NULL, { 0 }, { 0 } }, { "bb", 32 << 12, 4 << 12, NULL, { 0 }, { 0 } } };

#define BLOCKS (sizeof(blocks) / sizeof(blocks[0]))

static int open_uffd(void)
{
	uint64_t features, ioctls;
	int fd = uffd_open_syscall(O_CLOEXEC | O_NONBLOCK | 1 /* user mode only */);

	if (fd < 0 || uffd_api(fd, 0, &features, &ioctls) < 0)
		return -1;
	for (size_t i = 0; i < BLOCKS; i++)
		MUST(!uffd_register(fd, (uintptr_t)blocks[i].host, blocks[i].bytes, UFFDIO_REGISTER_MODE_MISSING,
				    &ioctls));
	return fd;
}

/* A page that is marked received is there, one that is not was not touched. */
static void check_residency(const struct block *b)
{
	for (uint64_t page = 0; page < b->bytes >> 12; page++) {
		unsigned char in_core;

		MUST(!mincore(b->host + (page << 12), 1 << 12, &in_core));
		MUST((in_core & 1) == bitmap_test(b->received, page));
	}
}

static void run(struct dst *d, uint8_t mode)
{
	bool urgent = !(mode & BEFORE_LISTEN) && mode & URGENT;
	const struct mig_error *e = urgent ? &d->urgent.error : &d->main.error;
	int ret;

	if (mode & BEFORE_LISTEN)
		ret = dst_load_ram(d);
	else if (urgent)
		ret = dst_urgent_loop(d);
	else
		ret = dst_listen_loop(d);
	MUST(ret >= -4095 && ret <= DST_SECTION);
	MUST(ret >= 0 || (e->code && e->message[0] && memchr(e->message, 0, sizeof(e->message))));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static int uffd = -2;
	struct feed f;
	struct dst *d;
	uint8_t mode;
	int err;

	if (size < 1 || size > FEED_MAX / 2)
		return 0;
	if (uffd == -2) {
		for (size_t i = 0; i < BLOCKS; i++)
			blocks[i].host = guarded(blocks[i].bytes);
		uffd = open_uffd();
	}
	mode = uffd < 0 ? data[0] & ~PLACED : data[0];
	feed_init(&f, data + 1, size - 1, mode & FRAMED);
	d = dst_new(f.ch, BLOCKS, 4 << 12, &err);
	MUST(d);
	for (size_t i = 0; i < BLOCKS; i++) {
		struct block *b = &blocks[i];

		b->received[0] = b->requested[0] = 0;
		MUST(!dst_set_block(d, (uint32_t)i, b->id, (uintptr_t)b->host, b->bytes, b->page_size,
				    (uintptr_t)b->received, (uintptr_t)b->requested, -1, 0, 0));
	}
	dst_seal(d);
	dst_set_ram_section(d, SECTION);
	dst_set_urgent_channel(d, f.ch);
	/* Stores touch memory themselves: they would wait for a page on registered memory. */
	if (mode & BEFORE_LISTEN || !(mode & PLACED)) {
		static uint8_t *plain[BLOCKS];

		for (size_t i = 0; i < BLOCKS; i++) {
			if (!plain[i])
				plain[i] = guarded(blocks[i].bytes);
			MUST(!dst_set_block(d, (uint32_t)i, blocks[i].id, (uintptr_t)plain[i], blocks[i].bytes,
					    blocks[i].page_size, (uintptr_t)blocks[i].received,
					    (uintptr_t)blocks[i].requested, -1, 0, 0));
		}
		dst_seal(d);
		dst_set_sink(d, NULL);
	} else {
		dst_start_postcopy(d, uffd, -1, -1, 0, 0, 0);
	}
	run(d, mode);
	for (size_t i = 0; mode & PLACED && !(mode & BEFORE_LISTEN) && i < BLOCKS; i++) {
		check_residency(&blocks[i]);
		MUST(!madvise(blocks[i].host, blocks[i].bytes, MADV_DONTNEED));
	}
	dst_free(d);
	feed_deinit(&f);
	return 0;
}
