// SPDX-License-Identifier: MIT
/* sources: migration/native/csrc/[a-z]*.c uffd/csrc/uffd.c uffd/csrc/pending.c guestmem/csrc/bitmap.c
	guestmem/csrc/zero.c */
/*
 * The destination's loop of a multifd channel fed any bytes, framed or not, with a main thread that meets it
 * at each SYNC. Blocks stand between unreadable pages.
 */
#include "fuzz_feed.h"

#include "bitmap.h"
#include "dst.h"

#include <pthread.h>

enum { FRAMED = 1, BLOCKS = 2 };

static struct block {
	const char *id;
	uint64_t bytes, page_size;
	uint8_t *host;
	uint64_t received[1], requested[1];
} blocks[BLOCKS] = {
	{ "a", 16 << 12, 1 << 12, NULL, { 0 }, { 0 } }, { "bb", 32 << 12, 4 << 12, NULL, { 0 }, { 0 } },
};

/* As the main thread does at each mark in the stream, for as long as there is a channel. */
static void *meet(void *d)
{
	while (dst_multifd_sync(d) == 0)
		;
	return NULL;
}

static bool is_zero(const uint8_t *page)
{
	static const uint8_t zeros[RAM_PAGE_BYTES];

	return !memcmp(page, zeros, sizeof(zeros));
}

/* Of pages that did not come nothing was written; whatever came can be told by its bit. */
static uint64_t check_block(struct block *b)
{
	uint64_t pages = b->bytes >> RAM_PAGE_BITS;

	for (uint64_t page = 0; page < pages; page++)
		MUST(bitmap_test(b->received, page) || is_zero(b->host + (page << RAM_PAGE_BITS)));
	MUST(!(b->received[0] >> (pages - 1) >> 1));
	return bitmap_count(b->received, 0, pages);
}

static struct dst *new_dst(struct chan *main_ch, struct chan *ch)
{
	struct dst *d;
	int err;

	d = dst_new(main_ch, BLOCKS, 4 << 12, &err);
	MUST(d);
	for (uint32_t i = 0; i < BLOCKS; i++) {
		struct block *b = &blocks[i];

		if (!b->host)
			b->host = guarded(b->bytes);
		memset(b->host, 0, b->bytes);
		b->received[0] = b->requested[0] = 0;
		MUST(!dst_set_block(d, i, b->id, (uintptr_t)b->host, b->bytes, b->page_size,
				    (uintptr_t)b->received, (uintptr_t)b->requested, -1, 0, 0));
	}
	dst_seal(d);
	MUST(!dst_multifd_init(d, 1, false));
	dst_multifd_set_channel(d, 0, ch);
	return d;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const struct mig_error *e;
	struct dst_stats stats;
	uint64_t came = 0;
	pthread_t thread;
	struct feed f, main_feed;
	struct dst *d;
	int ret;

	if (size < 1 || size > FEED_MAX / 2)
		return 0;
	feed_init(&f, data + 1, size - 1, data[0] & FRAMED);
	feed_init(&main_feed, data, 0, false);
	d = new_dst(main_feed.ch, f.ch);
	MUST(!pthread_create(&thread, NULL, meet, d));
	ret = dst_multifd_loop(d, 0);
	pthread_join(thread, NULL);
	e = dst_multifd_error(d, 0);
	MUST(ret <= 0 && ret >= -4095);
	MUST(!ret || (strstr(e->section, "channel 0") && strstr(e->message, "packet ")));
	MUST(d->main.error.code);	/* who waited was told why */
	for (uint32_t i = 0; i < BLOCKS; i++)
		came += check_block(&blocks[i]);
	dst_get_stats(d, &stats);
	MUST(stats.pages_normal + stats.pages_zero >= came && stats.precopy_pages >= came);
	dst_free(d);
	feed_deinit(&f);
	feed_deinit(&main_feed);
	return 0;
}
