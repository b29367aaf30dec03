// SPDX-License-Identifier: MIT
/* sources: migration/native/csrc/[a-z]*.c uffd/csrc/uffd.c uffd/csrc/pending.c guestmem/csrc/bitmap.c
	guestmem/csrc/zero.c */
/* The source's return-path loop fed any bytes, in postcopy or before, framed or not. Every page goes out once. */
#include "fuzz_feed.h"

#include "bitmap.h"
#include "src.h"

enum { FRAMED = 1, BEFORE_POSTCOPY = 2, RUN_ALONE = 4, FRAME_LATER = 8 };

static struct {
	const char *id;
	uint64_t bytes, page_size;
	uint8_t *host;
	uint64_t dirty[1];
} blocks[] = { { "a", 16 << 12, 1 << 12, NULL, { 0 } }, { "bb", 32 << 12, 4 << 12, NULL, { 0 } } };

#define BLOCKS (sizeof(blocks) / sizeof(blocks[0]))

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static int null = -1;
	struct src_stats stats;
	struct feed f;
	struct src *s;
	uint64_t left = 0;
	int err, ret;

	if (size < 1 || size > FEED_MAX / 2)
		return 0;
	if (null < 0) {
		null = open("/dev/null", O_WRONLY | O_CLOEXEC);
		for (size_t i = 0; i < BLOCKS; i++)
			blocks[i].host = guarded(blocks[i].bytes);
		blocks[0].host[5 << 12] = blocks[1].host[9 << 12] = 1;
	}
	feed_init(&f, data + 1, size - 1, data[0] & FRAMED);
	f.ch->wfd = null;	/* pages go nowhere, and never make it wait */
	f.ch->is_socket = false;
	MUST(!fcntl(f.fds[0], F_SETFL, O_NONBLOCK));
	s = src_new(f.ch, BLOCKS, &err);
	MUST(s);
	for (size_t i = 0; i < BLOCKS; i++) {
		blocks[i].dirty[0] = 0;
		bitmap_set(blocks[i].dirty, 0, blocks[i].bytes >> 12);
		MUST(!src_set_block(s, (uint32_t)i, blocks[i].id, (uintptr_t)blocks[i].host, blocks[i].bytes,
				    blocks[i].page_size, (uintptr_t)blocks[i].dirty));
	}
	if (data[0] & FRAME_LATER)
		src_set_frame_after_pong(s, 0x01010101);
	if (!(data[0] & BEFORE_POSTCOPY))
		MUST(!src_send_package(s, "", 0, data[0] & RUN_ALONE));
	ret = src_rp_loop(s);
	MUST(ret >= -4095 && ret <= SRC_RP_MESSAGE);
	MUST(ret >= 0 || (s->rp_error.code && s->rp_error.message[0]));
	src_get_stats(s, &stats);
	for (size_t i = 0; i < BLOCKS; i++)
		left += bitmap_count(blocks[i].dirty, 0, blocks[i].bytes >> 12);
	MUST(stats.postcopy_pages + left == 48 && stats.requested_pages == stats.postcopy_pages);
	MUST(!(data[0] & BEFORE_POSTCOPY) || left == 48);
	src_free(s);
	feed_deinit(&f);
	return 0;
}
