// SPDX-License-Identifier: MIT
/* sources: tests/native/migration_[cmrs]*.c tests/native/migration_destination.c
	migration/native/csrc/[a-z]*.c
	uffd/csrc/uffd.c uffd/csrc/pending.c guestmem/csrc/bitmap.c guestmem/csrc/zero.c */
/*
 * The data plane without an interpreter, for the sanitizers: whole migrations over a socket pair, with real
 * page faults, and the ways they fail. Exit 0 pass, 1 or a signal fail, 77 skip.
 */
#define _GNU_SOURCE
#include "migration_rig.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "be.h"
#include "bitmap.h"

#define TOUCHES 400u

static const struct rig_options plain = { .touches = TOUCHES, .precopy_bytes = 1 << 20 };

/* From wherever it stands to a clean end on both sides. */
static void must_complete(struct rig *r)
{
	rig_join_listen(r);
	if (r->listen_ret < 0)
		fprintf(stderr, "%s: %s\n", r->dst->main.error.section, r->dst->main.error.message);
	CHECK(r->listen_ret == DST_EOF);
	rig_join_source(r);
	rig_join_touchers(r);
	CHECK(r->migration_ret == 0 && r->return_path_ret == SRC_RP_SHUT && src_shut_value(r->src) == 0);
	CHECK(!r->o.urgent || r->urgent_ret == 0);
	CHECK(atomic_load(&r->lost) == 0 && dst_missing_pages(r->dst) == 0);
	CHECK(src_dirty_pages(r->src) == 0);
	rig_check_all(r);	/* pages that came as zeros before LISTEN are faulted in by this */
	rig_stop_fault(r);
}

/* Main has loaded everything and the guest runs. */
static void start_and_run(struct rig *r, const struct rig_options *o)
{
	rig_init(r, o);
	rig_start(r);
	pthread_join(r->main, NULL);
	CHECK(r->main_ret == 0 && r->listening);
}

static void migrate(const struct rig_options *o)
{
	struct dst_stats to;
	struct src_stats from;
	struct rig r;

	start_and_run(&r, o);
	must_complete(&r);
	dst_get_stats(r.dst, &to);
	src_get_stats(r.src, &from);
	CHECK(to.pages_normal == from.pages_normal && to.pages_zero == from.pages_zero);
	CHECK(from.requests == to.requests);
	rig_deinit(&r);
}

static void test_migrations(enum rig_memory memory)
{
	for (unsigned int bits = 0; bits < 16; bits++) {
		struct rig_options o = plain;

		o.memory = memory;
		o.framed = bits & 1;
		o.run_alone = bits & 2;
		o.urgent = bits & 4;
		o.precopy_bytes = bits & 8 ? o.precopy_bytes : 0;
		o.touch_in_device_load = bits & 2;
		migrate(&o);
	}
}

/* Release-ram: dropped at the source, and never between a page's dirty bit and the wire. */
static void test_release(enum rig_memory memory)
{
	for (unsigned int bits = 0; bits < 8; bits++) {
		struct rig_options o = plain;
		struct rig r;

		o.memory = memory;
		o.release = true;
		o.run_alone = bits & 1;
		o.urgent = bits & 2;
		o.touch_in_device_load = true;
		o.precopy_bytes = bits & 4 ? o.precopy_bytes : 0;
		start_and_run(&r, &o);
		must_complete(&r);
		for (uint32_t i = 0; i < RIG_BLOCKS; i++)
			for (uint64_t at = 0; at < r.blocks[i].bytes; at += 512)
				CHECK(!o.run_alone || !r.blocks[i].src[at]);
		rig_deinit(&r);
	}
}

/* Only what is asked for is sent, until the push is let go; then with a rate, then without. */
static void test_hold_and_rate(enum rig_memory memory, bool urgent)
{
	struct rig_options o = { .memory = memory, .hold = true, .touches = 60, .run_alone = true,
				 .urgent = urgent, .touch_in_device_load = true };
	struct dst_stats to;
	struct src_stats s;
	struct rig r;

	start_and_run(&r, &o);
	rig_join_touchers(&r);
	src_get_stats(r.src, &s);
	dst_get_stats(r.dst, &to);
	CHECK(to.requests_by_main > 0);
	CHECK(s.requests > 0 && s.postcopy_pages == s.requested_pages);
	CHECK(src_dirty_pages(r.src) > 0 || memory == RIG_HUGETLB);
	src_set_rate(r.src, 64 << 10);
	src_set_hold(r.src, false);
	rig_start_touchers(&r);
	rig_join_touchers(&r);
	src_set_rate(r.src, 0);
	rig_start_touchers(&r);
	must_complete(&r);
	rig_deinit(&r);
}

/* Asleep on pages that never come: poison wakes them, and nobody ever sees a zero page. */
static void test_give_up(enum rig_memory memory, bool urgent)
{
	struct rig_options o = { .memory = memory, .hold = true, .urgent = urgent, .framed = true };
	struct dst_stats before, now;
	int64_t poisoned;
	struct rig r;

	o.touches = memory == RIG_HUGETLB ? 0 : 20;	/* of three huge pages none would be left */
	start_and_run(&r, &o);
	rig_join_touchers(&r);
	src_stop(r.src);
	rig_join_source(&r);
	CHECK(r.migration_ret == -ECANCELED && r.src->error.code == ECANCELED);
	CHECK(r.return_path_ret == -ECANCELED && r.src->rp_error.code == ECANCELED);
	rig_join_listen(&r);
	CHECK(r.listen_ret < 0 && r.dst->main.error.code == EPIPE);
	CHECK(dst_missing_pages(r.dst) > 0);
	dst_get_stats(r.dst, &before);
	r.o.touches = 1u << 30;
	rig_start_touchers(&r);
	do {
		sched_yield();
		dst_get_stats(r.dst, &now);
	} while (now.faults < before.faults + RIG_TOUCHERS);
	poisoned = dst_poison_missing(r.dst);
	if (rig_has_no_poison(poisoned)) {
		puts("no UFFDIO_POISON in this kernel (Linux 6.6)");
		fflush(stdout);
		_exit(77);	/* sleepers are left that nobody can wake */
	}
	CHECK(poisoned == (int64_t)dst_missing_pages(r.dst));
	rig_join_touchers(&r);
	CHECK(atomic_load(&r.lost) == RIG_TOUCHERS);
	rig_check_received(&r);
	for (uint32_t i = 0; i < RIG_BLOCKS; i++)
		for (uint64_t page = 0; page < r.blocks[i].pages; page++)
			if (!bitmap_test(r.blocks[i].received, page))
				CHECK(rig_touch(&r, i, page) == -1);
	CHECK(dst_poison_missing(r.dst) == 0);	/* twice does no harm */
	rig_stop_fault(&r);
	rig_deinit(&r);
}

/* The line breaks at some byte after the package; both sides go on over a new one. */
static void test_pause_and_resume(enum rig_memory memory, bool framed, uint64_t at)
{
	struct rig_tamper tamper = { .at = at, .cut = true };
	struct rig_options o = { .memory = memory, .framed = framed, .touches = TOUCHES, .tamper = &tamper };
	struct rig r;

	rig_init(&r, &o);
	rig_start(&r);
	rig_join_source(&r);
	CHECK(r.return_path_ret < 0);	/* all of the stream may have been on its way */
	pthread_join(r.main, NULL);
	if (!r.listening) {
		CHECK(r.main_ret < 0);	/* inside the package: the guest is still the source's */
		rig_deinit(&r);
		return;
	}
	rig_join_listen(&r);
	CHECK(r.listen_ret < 0 && r.dst->main.error.code == EPIPE);
	rig_reconnect(&r);
	rig_resume(&r);
	must_complete(&r);
	rig_deinit(&r);
}

/* One flipped bit anywhere in a framed stream: an error that names the frame, and no wrong page. */
static void test_flipped(uint64_t at)
{
	struct rig_tamper tamper = { .at = at, .mask = 0x10 };
	struct rig_options o = { .framed = true, .touches = 1u << 30, .precopy_bytes = 1 << 18, .tamper = &tamper };
	const struct mig_error *e;
	struct rig r;

	rig_init(&r, &o);
	rig_start(&r);
	pthread_join(r.main, NULL);
	if (r.listening) {
		rig_join_listen(&r);
		CHECK(r.listen_ret == -EBADMSG || r.listen_ret == -EPIPE);
		chan_abort(r.dst_ch);
		CHECK(dst_poison_missing(r.dst) >= 0);
		atomic_store(&r.cancelled, true);
		rig_join_touchers(&r);
		rig_check_received(&r);
		rig_stop_fault(&r);
		e = &r.dst->main.error;
	} else {
		CHECK(r.main_ret == -EBADMSG || r.main_ret == -EPIPE);
		chan_abort(r.dst_ch);
		e = &r.dst_ch->rerror;
	}
	CHECK(e->code == EBADMSG || e->code == EPIPE);
	CHECK(!strcmp(e->section, "frame") && strstr(e->message, "frame ") && e->offset <= at);
	rig_join_source(&r);
	CHECK(r.return_path_ret < 0);	/* all of the stream may have been on its way */
	rig_deinit(&r);
}

/* Another mapping of the file made pages before they came: what is sent wins, data and zeros alike. */
static void test_page_cache(void)
{
	struct rig_options o = { .memory = RIG_MEMFD, .hold = true, .touches = 30 };
	struct rig r;

	start_and_run(&r, &o);
	rig_join_touchers(&r);
	for (uint32_t i = 0; i < RIG_BLOCKS; i++) {
		struct rig_block *b = &r.blocks[i];
		uint8_t *other = mmap(NULL, b->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd, 0);

		CHECK(other != MAP_FAILED);
		for (uint64_t page = 0; page < b->pages; page++)
			if (bitmap_test_acquire(b->dirty, page) && page % 3 == 0)	/* not on its way either */
				other[page * PAGE + 8] = 0x5a;
		munmap(other, b->bytes);
	}
	rig_start_touchers(&r);		/* minor faults on pages that have not come */
	src_set_hold(r.src, false);
	must_complete(&r);
	rig_deinit(&r);
}

/* -- a hostile return path ----------------------------------------------------------------------------- */

struct hostile {
	const char *words;	/* expected in the error */
	uint8_t bytes[24];
	size_t n;
};

static const struct hostile hostiles[] = {
	{ "no return-path message", { 0, 0, 0, 4 }, 4 },
	{ "no return-path message", { 0, 4, 0xff, 0xff }, 4 },
	{ "wrong length", { 0, 1, 0, 5, 0, 0, 0, 0, 0 }, 9 },
	{ "wrong length", { 0, 2, 0, 3, 0, 0, 0 }, 7 },
	{ "wrong length", { 0, 4, 0, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, 15 },
	{ "wrong length", { 0, 3, 0, 13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0 }, 17 },
	{ "another length", { 0, 3, 0, 14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 9, 'v' }, 18 },
	{ "unknown block", { 0, 3, 0, 14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 1, 'v' }, 18 },
	{ "names no block", { 0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0 }, 16 },
	{ "not page aligned", { 0, 3, 0, 16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 16, 0, 3, 'v', 'g', 'a' }, 20 },
	{ "not page aligned", { 0, 3, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 'v', 'g', 'a' }, 20 },
	{ "beyond the end", { 0, 3, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 16, 0, 3, 'v', 'g', 'a' }, 20 },
	{ "beyond the end", { 0, 3, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xf0, 0, 3, 'v', 'g', 'a' }, 20 },
	{ "beyond the end",
	  { 0, 3, 0, 16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 32, 0, 3, 'v', 'g', 'a' }, 20 },
	{ "before postcopy", { 0, 3, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 3, 'v', 'g', 'a' }, 20 },
};

static void test_hostile_return_path(const struct hostile *h)
{
	struct rig_options o = { 0 };
	struct rig r;

	rig_init(&r, &o);
	CHECK(send(r.fds[1], h->bytes, h->n, MSG_NOSIGNAL) == (ssize_t)h->n);
	CHECK(src_rp_loop(r.src) == -EBADMSG);
	CHECK(r.src->rp_error.code == EBADMSG && strstr(r.src->rp_error.message, h->words));
	CHECK(r.src->rp_error.offset == 0 && !strcmp(r.src->rp_error.section, "return path"));
	rig_deinit(&r);
}

static void *flood_thread(void *rig)
{
	struct rig *r = rig;
	uint8_t named[20] = { 0, 3, 0, 16 }, shut[8] = { 0, 1, 0, 4 };

	put_be32(named + 12, PAGE);
	memcpy(named + 16, "\3vga", 4);
	for (uint32_t n = 0; n < 4 * SRC_RING; n++) {
		put_be64(named + 4, (uint64_t)(n * 7 % (uint32_t)r->blocks[1].pages) * PAGE);
		CHECK(!chan_write(r->dst_ch, named, sizeof(named)));
	}
	CHECK(!chan_write(r->dst_ch, shut, sizeof(shut)) && !chan_flush(r->dst_ch));
	return NULL;
}

static void *drain_thread(void *fd)
{
	uint8_t buf[8192];

	while (recv(*(int *)fd, buf, sizeof(buf), 0) > 0)
		;
	return NULL;
}

/* More requests than the ring holds, nearly all of them for pages sent before: each page goes out once. */
static void test_flood(bool urgent)
{
	struct rig_options o = { .hold = true, .urgent = urgent };
	pthread_t flood, drain[2];
	struct src_stats s;
	struct rig r;

	rig_init(&r, &o);
	CHECK(!pthread_create(&drain[0], NULL, drain_thread, &r.fds[1]));
	if (urgent)
		CHECK(!pthread_create(&drain[1], NULL, drain_thread, &r.urgent_fds[1]));
	rig_start_source(&r);
	while (!atomic_load(&r.src->postcopy))
		sched_yield();
	CHECK(!pthread_create(&flood, NULL, flood_thread, &r));
	pthread_join(r.return_path, NULL);
	CHECK(r.return_path_ret == SRC_RP_SHUT);
	src_get_stats(r.src, &s);
	CHECK(s.requests == 4 * SRC_RING && s.postcopy_pages == s.requested_pages);
	src_set_hold(r.src, false);
	pthread_join(r.migration, NULL);
	CHECK(r.migration_ret == 0);
	src_get_stats(r.src, &s);
	CHECK(s.requested_pages + s.duplicate_requests == 4 * SRC_RING);
	CHECK(s.postcopy_pages == r.blocks[0].pages + r.blocks[1].pages);
	pthread_join(flood, NULL);
	shutdown(r.fds[0], SHUT_WR);
	pthread_join(drain[0], NULL);
	if (urgent) {
		shutdown(r.urgent_fds[0], SHUT_WR);
		pthread_join(drain[1], NULL);
	}
	rig_deinit(&r);
}

/* A sanitizer's report then says which one it was. */
#define STEP(call) \
	do { \
		fprintf(stderr, "%s\n", #call); \
		call; \
	} while (0)

static void test_memory(enum rig_memory memory)
{
	static const char *const names[RIG_MEMORIES] = { "anon", "memfd", "hugetlb" };
	const char *missing = rig_missing(memory);

	fprintf(stderr, "--- %s%s%s\n", names[memory], missing ? ": left out: " : "", missing ? missing : "");
	if (missing)
		return;
	STEP(test_migrations(memory));
	STEP(test_release(memory));
	for (int urgent = 0; urgent < 2; urgent++) {
		STEP(test_hold_and_rate(memory, urgent));
		STEP(test_give_up(memory, urgent));
	}
	for (uint64_t at = 300; at < 2400000; at += 200000)
		STEP(test_pause_and_resume(memory, at / 200000 % 2, at));
}

int main(void)
{
	const char *missing;

	STEP(codecs_run());
	STEP(channel_run());
	STEP(multifd_run());
	for (size_t i = 0; i < sizeof(hostiles) / sizeof(hostiles[0]); i++)
		STEP(test_hostile_return_path(&hostiles[i]));
	STEP(test_flood(false));
	STEP(test_flood(true));
	missing = rig_missing(RIG_ANON);
	if (missing) {
		puts(missing);
		return 77;
	}
	rig_catch_sigbus();
	for (int memory = 0; memory < RIG_MEMORIES; memory++)
		test_memory((enum rig_memory)memory);
	for (uint64_t at = 3; at < 2400000; at += 150001)
		STEP(test_flipped(at));
	STEP(test_page_cache());
	STEP(streams_run());
	return 0;
}
