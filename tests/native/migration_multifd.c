// SPDX-License-Identifier: MIT
/*
 * Multifd channels without an interpreter: precopies over several of them, in passes, with zero pages that were
 * data and data that was zero; and the ways they end before their time.
 */
#define _GNU_SOURCE
#include "migration_rig.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "be.h"
#include "bitmap.h"
#include "multifd.h"

enum { BLOCKS = 2, CHANNELS_MAX = 4, PASSES = 5, PART = 2, END = 3, FOOTER = 0x7e, SECTION_ID = 7 };

static const char *const ids[BLOCKS] = { "ram", "second" };
static const uint64_t block_pages[BLOCKS] = { 700, 33 };

struct how {
	uint32_t channels;
	bool framed, each_section;
	enum src_zero zero;
};

struct link {
	int fds[2];
	struct chan *from, *to;
};

struct both;

struct channel_thread {
	struct both *both;
	uint32_t index;
	pthread_t source, destination;
	int source_ret, destination_ret;
};

struct both {
	struct how how;
	struct link main, channels[CHANNELS_MAX];
	struct channel_thread threads[CHANNELS_MAX];
	struct src *src;
	struct dst *dst;
	uint8_t *there[BLOCKS], *here[BLOCKS];
	uint64_t *dirty[BLOCKS], *received[BLOCKS], *requested[BLOCKS];
	pthread_t reader;
	int reader_ret;
};

static void open_link(struct link *l, bool framed)
{
	int err;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, l->fds));
	l->from = chan_new(l->fds[0], l->fds[0], true, &err);
	l->to = chan_new(l->fds[1], l->fds[1], true, &err);
	CHECK(l->from && l->to);
	if (framed) {
		CHECK(!chan_set_write_framed(l->from));
		chan_set_read_framed(l->to);
	}
}

static void close_link(struct link *l)
{
	chan_free(l->from);
	chan_free(l->to);
	close(l->fds[0]);
	close(l->fds[1]);
}

static void *source_channel(void *p)
{
	struct channel_thread *t = p;

	t->source_ret = src_multifd_loop(t->both->src, t->index);
	return NULL;
}

static void *destination_channel(void *p)
{
	struct channel_thread *t = p;

	t->destination_ret = dst_multifd_loop(t->both->dst, t->index);
	if (t->destination_ret < 0)
		chan_abort(t->both->main.to);	/* as the runtime does */
	return NULL;
}

/* Sections up to the last one; the first meeting stands for the START section's. */
static int read_sections(struct both *b)
{
	uint8_t head[5], foot[5] = { 0 };
	int ret = dst_multifd_sync(b->dst);

	do {
		if (ret < 0)
			return ret;
		ret = chan_read(b->main.to, head, sizeof(head));
		if (ret < 0)
			return ret;
		CHECK(get_be32(head + 1) == SECTION_ID);
		ret = dst_load_ram(b->dst);
		if (!ret)
			ret = chan_read(b->main.to, foot, sizeof(foot));
		CHECK(ret || foot[0] == FOOTER);
	} while (ret || head[0] != END);
	return ret;
}

static void *reader(void *p)
{
	struct both *b = p;

	b->reader_ret = read_sections(b);
	if (b->reader_ret < 0) {
		dst_multifd_stop(b->dst);
		for (uint32_t i = 0; i < b->how.channels; i++)
			chan_abort(b->channels[i].to);
		chan_abort(b->main.to);
	}
	return NULL;
}

static void open_both(struct both *b, const struct how *how)
{
	int err;

	memset(b, 0, sizeof(*b));
	b->how = *how;
	open_link(&b->main, how->framed);
	b->src = src_new(b->main.from, BLOCKS, &err);
	b->dst = dst_new(b->main.to, BLOCKS, PAGE, &err);
	CHECK(b->src && b->dst);
	for (uint32_t i = 0; i < BLOCKS; i++) {
		uint64_t bytes = block_pages[i] * PAGE;

		b->there[i] = aligned_alloc(PAGE, bytes);
		b->here[i] = aligned_alloc(PAGE, bytes);
		CHECK(b->there[i] && b->here[i]);
		memset(b->there[i], 0, bytes);
		memset(b->here[i], 0, bytes);
		b->dirty[i] = rig_bits(block_pages[i]);
		b->received[i] = rig_bits(block_pages[i]);
		b->requested[i] = rig_bits(block_pages[i]);
		CHECK(!src_set_block(b->src, i, ids[i], (uintptr_t)b->there[i], bytes, PAGE, (uintptr_t)b->dirty[i]));
		CHECK(!dst_set_block(b->dst, i, ids[i], (uintptr_t)b->here[i], bytes, PAGE,
				     (uintptr_t)b->received[i], (uintptr_t)b->requested[i], -1, 0, 0));
	}
	dst_seal(b->dst);
	src_set_ram_section(b->src, SECTION_ID);
	src_set_zero_detection(b->src, how->zero);
	CHECK(src_multifd_init(b->src, 0, false) < 0 && src_multifd_init(b->src, MULTIFD_CHANNELS + 1, false) < 0);
	CHECK(!src_multifd_init(b->src, how->channels, how->each_section));
	CHECK(!dst_multifd_init(b->dst, how->channels, how->each_section));
	for (uint32_t i = 0; i < how->channels; i++) {
		struct channel_thread *t = &b->threads[i];

		open_link(&b->channels[i], how->framed);
		src_multifd_set_channel(b->src, i, b->channels[i].from);
		dst_multifd_set_channel(b->dst, i, b->channels[i].to);
		t->both = b;
		t->index = i;
		CHECK(!pthread_create(&t->source, NULL, source_channel, t));
		CHECK(!pthread_create(&t->destination, NULL, destination_channel, t));
	}
	CHECK(!pthread_create(&b->reader, NULL, reader, b));
}

/* Joins what is left of it; both sides were told to end, or have. */
static void close_both(struct both *b)
{
	src_stop(b->src);
	dst_multifd_stop(b->dst);
	chan_abort(b->main.to);
	pthread_join(b->reader, NULL);
	for (uint32_t i = 0; i < b->how.channels; i++) {
		pthread_join(b->threads[i].source, NULL);
		pthread_join(b->threads[i].destination, NULL);
	}
	src_free(b->src);
	dst_free(b->dst);
	close_link(&b->main);
	for (uint32_t i = 0; i < b->how.channels; i++)
		close_link(&b->channels[i]);
	for (uint32_t i = 0; i < BLOCKS; i++) {
		free(b->there[i]);
		free(b->here[i]);
		free(b->dirty[i]);
		free(b->received[i]);
		free(b->requested[i]);
	}
}

/* The guest's writes of one pass: some pages zero, some data, most as they were. */
static void write_pages(struct both *b, unsigned int pass)
{
	for (uint32_t i = 0; i < BLOCKS; i++) {
		for (uint64_t page = 0; page < block_pages[i]; page++) {
			uint64_t dice = rig_random() % 4;

			if (pass && dice > 1)
				continue;
			if (dice)
				rig_noise(b->there[i] + page * PAGE, PAGE);
			else
				memset(b->there[i] + page * PAGE, 0, PAGE);
			bitmap_set(b->dirty[i], page, 1);
		}
	}
}

static int send_everything(struct both *b)
{
	int ret = src_multifd_sync(b->src);
	int64_t sent = 0;

	for (unsigned int pass = 0; !ret && pass < PASSES; pass++) {
		ret = src_multifd_flush(b->src);
		write_pages(b, pass);
		while (!ret && src_dirty_pages(b->src)) {
			sent = src_send_part(b->src, PART, 1 << 20);
			ret = sent < 0 ? (int)sent : 0;
		}
	}
	if (!ret)
		ret = src_multifd_flush(b->src);
	if (ret)
		return ret;
	write_pages(b, PASSES);
	sent = src_send_part(b->src, END, UINT64_MAX >> 1);
	return sent < 0 ? (int)sent : 0;
}

static void test_passes(const struct how *how)
{
	struct src_stats from;
	struct dst_stats to;
	struct both b;

	open_both(&b, how);
	CHECK(send_everything(&b) == 0);
	pthread_join(b.reader, NULL);
	CHECK(b.reader_ret == 0);
	for (uint32_t i = 0; i < BLOCKS; i++)
		CHECK(!memcmp(b.here[i], b.there[i], block_pages[i] * PAGE));
	CHECK(dst_missing_pages(b.dst) == 0);
	src_get_stats(b.src, &from);
	dst_get_stats(b.dst, &to);
	CHECK(from.pages_normal == to.pages_normal && from.pages_zero == to.pages_zero);
	CHECK((from.pages_zero == 0) == (how->zero == SRC_ZERO_NONE));
	CHECK(!pthread_create(&b.reader, NULL, reader, &b));	/* for close_both; it finds the channels stopped */
	close_both(&b);
	for (uint32_t i = 0; i < how->channels; i++)
		CHECK(!b.threads[i].source_ret && !b.threads[i].destination_ret);
}

/* One channel breaks in the middle: both migration threads hear of it, nobody waits for ever. */
static void test_cut(const struct how *how, uint32_t which, bool at_source)
{
	struct both b;
	int ret;

	open_both(&b, how);
	write_pages(&b, 0);
	chan_abort(at_source ? b.channels[which].from : b.channels[which].to);
	ret = send_everything(&b);
	CHECK(ret == -EPIPE || ret == -ECANCELED || ret == -ECONNRESET);
	/* The channel's own error, or "stopped", which the others were when they heard of it first. */
	CHECK(b.src->error.code);
	CHECK(strstr(b.src->error.message, "stopped") || strstr(b.src->error.message, "channel"));
	chan_abort(b.main.from);
	close_both(&b);
	CHECK(b.reader_ret < 0);
}

static void *stop_soon(void *p)
{
	struct both *b = p;

	/* The other side reads nothing any more, so the migration thread is on its way into a wait. */
	src_stop(b->src);
	return NULL;
}

static void test_stop(const struct how *how)
{
	pthread_t stopper;
	struct both b;

	open_both(&b, how);
	CHECK(!pthread_create(&stopper, NULL, stop_soon, &b));
	while (send_everything(&b) == 0)
		;
	pthread_join(stopper, NULL);
	CHECK(b.src->error.code);
	close_both(&b);
}

static void test_codec(void)
{
	static const uint32_t fields[] = { 0, 4, 8, 12, 16, 20, 32, 319 };
	struct multifd_packet p = { .normal = 2, .zero = 1, .slots = MULTIFD_SLOTS, .number = 1ull << 40,
				    .idstr = "ram", .offsets = { 0, 8 * PAGE, 1ull << 50 } }, back;
	uint8_t buf[MULTIFD_HEADER], bad[MULTIFD_HEADER];

	multifd_encode(buf, &p);
	CHECK(!multifd_decode(buf, &back));
	CHECK(back.normal == 2 && back.zero == 1 && back.number == p.number && !strcmp(back.idstr, "ram"));
	CHECK(!memcmp(back.offsets, p.offsets, 3 * sizeof(*p.offsets)));
	for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++) {
		memcpy(bad, buf, sizeof(bad));
		bad[fields[i]] ^= 0x80;
		CHECK(multifd_decode(bad, &back));
	}
	for (int i = 0; i < 20000; i++) {
		rig_noise(bad, sizeof(bad));
		memcpy(bad, buf, 8 + rig_random() % 32);
		multifd_decode(bad, &back);
	}
}

void multifd_run(void)
{
	test_codec();
	for (unsigned int bits = 0; bits < 12; bits++) {
		struct how how = { .channels = 1 + bits % CHANNELS_MAX, .framed = bits & 1, .each_section = bits & 2,
				   .zero = (enum src_zero)(bits % 3) };

		/* Nobody older than 8.1 reads zero pages in packets, but that is not the loops' business. */
		test_passes(&how);
		test_cut(&how, bits % how.channels, bits & 4);
		test_stop(&how);
	}
}
