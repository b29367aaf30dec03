// SPDX-License-Identifier: MIT
/* Streams made by hand for a listening destination, right and wrong ones; and a relay of two legs. */
#define _GNU_SOURCE
#include "migration_rig.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

#include "be.h"
#include "bitmap.h"
#include "uffd.h"

/* One piece of a stream. */
enum piece {
	END_OF_CASE, SECTION, PAGE_OF, ZERO_OF, WORD, NAMED_WORD, EOS, FOOTER, BYTE, COMMAND,
};

struct op {
	enum piece piece;
	const char *id;		/* NULL: the same block as before */
	uint64_t value;
};

struct stream_case {
	int ret;		/* of dst_listen_loop */
	const char *section, *words;
	struct op ops[12];
};

static size_t put_op(uint8_t *to, const struct op *op)
{
	size_t n = 0;

	switch (op->piece) {
	case SECTION:
		to[0] = 2;
		put_be32(to + 1, (uint32_t)op->value);
		return 5;
	case PAGE_OF:
		n = ramrec_encode(to, op->value, RAM_FLAG_PAGE, op->id, op->id ? (uint8_t)strlen(op->id) : 0);
		memset(to + n, 0x77, PAGE);
		return n + PAGE;
	case ZERO_OF:
		n = ramrec_encode(to, op->value & ~(uint64_t)0xfff, RAM_FLAG_ZERO, op->id,
				  op->id ? (uint8_t)strlen(op->id) : 0);
		to[n] = (uint8_t)op->value;
		return n + 1;
	case NAMED_WORD:
	case WORD:
		put_be64(to, op->value);
		if (op->piece == WORD)
			return 8;
		to[8] = (uint8_t)strlen(op->id);
		memcpy(to + 9, op->id, to[8]);
		return 9u + to[8];
	case EOS:
		put_be64(to, RAM_FLAG_EOS);
		return 8;
	case FOOTER:
		to[0] = 0x7e;
		put_be32(to + 1, (uint32_t)op->value);
		return 5;
	case BYTE:
		to[0] = (uint8_t)op->value;
		return 1;
	case COMMAND:		/* number, then its length */
		to[0] = 8;
		put_be32(to + 1, (uint32_t)op->value);
		return 5;
	default:
		return 0;
	}
}

#define S { SECTION, NULL, RIG_SECTION }
#define F { FOOTER, NULL, RIG_SECTION }
#define E { EOS, NULL, 0 }

static const struct stream_case cases[] = {
	{ DST_EOF, "", "", { S, { PAGE_OF, "vga", 0 }, { PAGE_OF, NULL, PAGE }, { ZERO_OF, NULL, 2 * PAGE }, E, F,
			     { BYTE, NULL, 0 } } },
	{ DST_SECTION, "", "", { { BYTE, NULL, 4 } } },
	{ DST_SECTION, "", "", { { BYTE, NULL, 0x99 } } },
	{ DST_SECTION, "", "", { { SECTION, NULL, 7 } } },
	{ DST_COMMAND, "", "", { { COMMAND, NULL, 6 << 16 | 4 } } },
	{ DST_COMMAND, "", "", { { COMMAND, NULL, 5 << 16 } } },	/* RUN: not agreed on to come alone */
	{ DST_COMMAND, "", "", { { COMMAND, NULL, 2 << 16 | 5 } } },
	{ -EPIPE, "", "closed before the end", { { END_OF_CASE, NULL, 0 } } },
	{ -EPIPE, "section", "closed", { { BYTE, NULL, 2 } } },
	{ -EPIPE, "ram", "inside a section", { S } },
	{ -EPIPE, "ram", "inside a section", { S, { NAMED_WORD, "vga", RAM_FLAG_PAGE } } },
	{ -EPIPE, "ram", "closed", { S, E } },
	{ -EPIPE, "command", "closed", { { BYTE, NULL, 8 } } },
	{ -EPIPE, "PING", "closed", { { COMMAND, NULL, 2 << 16 | 4 } } },
	{ -EBADMSG, "ram", "no footer", { S, E, { FOOTER, NULL, 1 } } },
	{ -EBADMSG, "ram", "no footer", { S, E, { SECTION, NULL, RIG_SECTION } } },
	{ -EBADMSG, "ram", "no legal RAM record", { S, { WORD, NULL, 0 } } },
	{ -EBADMSG, "ram", "no legal RAM record", { S, { WORD, NULL, RAM_FLAG_PAGE | RAM_FLAG_ZERO } } },
	{ -EBADMSG, "ram", "no legal RAM record", { S, { WORD, NULL, RAM_FLAG_EOS | PAGE } } },
	{ -EBADMSG, "ram", "no legal RAM record", { S, { NAMED_WORD, "", RAM_FLAG_PAGE } } },
	{ -EBADMSG, "ram", "does not allow", { S, { WORD, NULL, RAM_FLAG_MEM_SIZE | PAGE } } },
	{ -EBADMSG, "ram", "does not allow", { S, { NAMED_WORD, "vga", RAM_FLAG_COMPRESS }, { WORD, NULL, 0 } } },
	{ -EBADMSG, "ram", "XBZRLE record in postcopy", { S, { NAMED_WORD, "vga", RAM_FLAG_XBZRLE }, { WORD, NULL, 0 } } },
	{ -EBADMSG, "ram", "unknown RAM block 'vgb'", { S, { PAGE_OF, "vgb", 0 } } },
	{ -EBADMSG, "ram", "none was named", { S, { PAGE_OF, NULL, 0 } } },
	{ -EBADMSG, "ram", "beyond the end", { S, { PAGE_OF, "vga", 257 * PAGE } } },
	{ -EBADMSG, "ram", "beyond the end", { S, { PAGE_OF, "vga", ~(uint64_t)0xfff } } },
	{ -EBADMSG, "ram", "another fill byte", { S, { ZERO_OF, "vga", 1 } } },
	{ -EPROTO, "ram", "already here", { S, { PAGE_OF, "vga", 0 }, { PAGE_OF, NULL, 0 }, E, F } },
	{ -EPROTO, "ram", "already here", { S, { ZERO_OF, "vga", 0 }, { PAGE_OF, NULL, 0 }, E, F } },
	{ -EPROTO, "ram", "already here",
	  { S, { PAGE_OF, "vga", PAGE }, { PAGE_OF, NULL, 2 * PAGE }, { ZERO_OF, NULL, PAGE }, E, F } },
	{ -EPROTO, "ram", "already here", { S, { ZERO_OF, "vga", 0 }, E, F, S, { ZERO_OF, "vga", 0 }, E, F } },
};

static void test_case(const struct stream_case *c)
{
	static uint8_t bytes[12 * (PAGE + 64)];
	struct rig_options o = { .memory = RIG_MEMFD };
	const struct mig_error *e;
	size_t n = 0;
	struct rig r;
	int ret;

	rig_init(&r, &o);
	rig_register(&r);
	dst_start_postcopy(r.dst, r.uffd, r.stop_fd, -1, 0, (uintptr_t)&r.pending, 0);
	for (const struct op *op = c->ops; op->piece != END_OF_CASE; op++)
		n += put_op(bytes + n, op);
	CHECK(send(r.fds[0], bytes, n, MSG_NOSIGNAL) == (ssize_t)n);
	shutdown(r.fds[0], SHUT_WR);
	ret = dst_listen_loop(r.dst);
	e = &r.dst->main.error;
	if (ret != c->ret || (ret < 0 && (strcmp(e->section, c->section) || !strstr(e->message, c->words))))
		fprintf(stderr, "case %zu: %d, '%s': '%s'\n", (size_t)(c - cases), ret, e->section, e->message);
	CHECK(ret == c->ret && e->code == (ret < 0 ? -ret : 0));
	CHECK(ret >= 0 || (!strcmp(e->section, c->section) && strstr(e->message, c->words)));
	CHECK(ret >= 0 || e->offset <= n);
	rig_deinit(&r);
}

/* An end of the preempt channel that is no end. */
static void test_urgent_end(bool bad_frame)
{
	struct rig_options o = { .memory = RIG_ANON, .urgent = true, .framed = bad_frame };
	static const uint8_t no_frame[8] = { 0, 0, 0, 4, 1, 2, 3, 4 };
	uint8_t eos[8];
	struct rig r;

	rig_init(&r, &o);
	rig_register(&r);
	dst_start_postcopy(r.dst, r.uffd, r.stop_fd, -1, 0, (uintptr_t)&r.pending, 0);
	put_be64(eos, RAM_FLAG_EOS);
	CHECK(!chan_write(r.src_urgent, eos, sizeof(eos)) && !chan_flush(r.src_urgent));
	if (bad_frame)
		CHECK(send(r.urgent_fds[0], no_frame, sizeof(no_frame), MSG_NOSIGNAL) == sizeof(no_frame));
	shutdown(r.urgent_fds[0], SHUT_WR);
	CHECK(dst_urgent_loop(r.dst) == (bad_frame ? -EPIPE : 0));
	CHECK(!bad_frame || !strcmp(r.dst->urgent.error.section, "frame"));
	rig_deinit(&r);
}

/* Half a huge page came, as zeros, before a LISTEN without a discard. Given up, the rest must not read as zeros. */
static void test_poison_of_half_a_page(void)
{
	struct rig_options o = { .memory = RIG_HUGETLB };
	struct rig r;
	int64_t ret;

	rig_init(&r, &o);
	bitmap_set_atomic(r.blocks[1].received, 0, 100);
	rig_register(&r);
	dst_start_postcopy(r.dst, r.uffd, r.stop_fd, -1, 0, (uintptr_t)&r.pending, 0);
	ret = dst_poison_missing(r.dst);
	CHECK(ret == (int64_t)(r.blocks[0].pages + r.blocks[1].pages) || rig_has_no_poison(ret));
	CHECK(ret < 0 || rig_touch(&r, 1, 300) == -1);
	rig_deinit(&r);
}

/* -- a pool of huge pages that is dry ------------------------------------------------------------------ */

/* A file system of our own with one huge page, in a mount namespace of our own. -1: not for us. */
static int small_hugetlbfs(void)
{
	char folder[] = "/tmp/rig-XXXXXX", path[32];
	int fd = -1;

	if (!mkdtemp(folder))
		return -1;
	if (!unshare(CLONE_NEWNS) && !mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) &&
	    !mount("none", folder, "hugetlbfs", 0, "pagesize=2M,size=2M")) {
		snprintf(path, sizeof(path), "%s/ram", folder);
		fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		CHECK(fd >= 0 && !unlink(path) && !ftruncate(fd, 2 * RIG_HUGE));
		umount2(folder, MNT_DETACH);
	}
	rmdir(folder);
	return fd;
}

static void *touch_first_byte(void *at)
{
	return (void *)(uintptr_t)*(volatile uint8_t *)at;
}

/* The second huge page has no room: an error that says so, never a sleeper woken for ever, nor a smashed stack. */
static void test_dry_pool(void)
{
	struct rig_options o = { .memory = RIG_ANON };
	int fd = small_hugetlbfs(), err;
	uint64_t ioctls;
	uint64_t *bits = rig_bits(1024), *asked = rig_bits(1024);
	static uint8_t page[2][RIG_HUGE / PAGE * 9 + 64];
	pthread_t sleeper;
	void *value;
	struct dst *d;
	struct rig r;
	uint8_t *ram;
	size_t n = 0;

	ram = fd < 0 ? MAP_FAILED :
		mmap(NULL, 2 * RIG_HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (ram == MAP_FAILED) {
		fprintf(stderr, "no hugetlbfs of our own: the dry pool was left out\n");
		free(bits);
		free(asked);
		return;
	}
	rig_init(&r, &o);
	r.uffd = rig_uffd();
	CHECK(!uffd_register(r.uffd, (uintptr_t)ram, 2 * RIG_HUGE, UFFDIO_REGISTER_MODE_MISSING, &ioctls));
	d = dst_new(r.dst_ch, 1, RIG_HUGE, &err);
	CHECK(d && !dst_set_block(d, 0, "huge", (uintptr_t)ram, 2 * RIG_HUGE, RIG_HUGE, (uintptr_t)bits,
				  (uintptr_t)asked, fd, 1, 1));
	dst_seal(d);
	dst_set_ram_section(d, RIG_SECTION);
	dst_start_postcopy(d, r.uffd, r.stop_fd, -1, 0, (uintptr_t)&r.pending, 0);
	/* Both pages come, as zeros. The first takes the room. */
	page[0][n++] = 2;
	put_be32(page[0] + n, RIG_SECTION);
	n += 4;
	for (uint64_t at = 0; at < RIG_HUGE; at += PAGE) {
		n += ramrec_encode(page[0] + n, at, RAM_FLAG_ZERO, at ? NULL : "huge", 4);
		page[0][n++] = 0;
	}
	CHECK(send(r.fds[0], page[0], n, MSG_NOSIGNAL) == (ssize_t)n);
	for (uint64_t at = n = 0; at < RIG_HUGE; at += PAGE) {
		n += ramrec_encode(page[1] + n, RIG_HUGE + at, RAM_FLAG_ZERO, NULL, 0);
		page[1][n++] = 0;
	}
	CHECK(send(r.fds[0], page[1], n, MSG_NOSIGNAL) == (ssize_t)n);
	CHECK(dst_listen_loop(d) == -ENOSPC);
	CHECK(strstr(d->main.error.message, "block huge offset 0x200000: no free huge page of 2048 KiB"));
	CHECK(bitmap_test(bits, 511) && !bitmap_test(bits, 512));
	/* And when it counts as received, zero and not populated yet: its sleeper cannot be helped either. */
	bitmap_set_atomic(bits, 512, 512);
	CHECK(!pthread_create(&sleeper, NULL, touch_first_byte, ram + RIG_HUGE));
	CHECK(dst_fault_loop(d) == -ENOSPC);
	CHECK(strstr(d->fault_error.message, "no free huge page of 2048 KiB"));
	/* Room again: the sleeper goes on, and reads its zero. */
	CHECK(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, RIG_HUGE));
	CHECK(!dst_place_zero_local(d, &d->blocks[0], RIG_HUGE));
	pthread_join(sleeper, &value);
	CHECK(!value);
	dst_free(d);
	rig_deinit(&r);
	munmap(ram, 2 * RIG_HUGE);
	close(fd);
	free(bits);
	free(asked);
}

/* -- a relay: a's destination is a sink, and b's source is fed by it -------------------------------- */

struct relay {
	struct rig a, b;
	pthread_t sink;
	int sink_ret;
	uint64_t *wanted[RIG_BLOCKS];
};

static void *sink_thread(void *relay)
{
	struct relay *x = relay;

	x->sink_ret = dst_listen_loop(x->a.dst);
	src_set_more_coming(x->b.src, false);
	return NULL;
}

/* a's source and its sink start in postcopy; b's whole migration runs beside. */
static void relay_init(struct relay *x, bool urgent)
{
	struct rig_options from = { .memory = RIG_ANON, .hold = true };
	struct rig_options to = { .memory = RIG_ANON, .touches = 300, .urgent = urgent, .keep_clean = true };

	memset(x, 0, sizeof(*x));
	rig_init(&x->a, &from);
	rig_init(&x->b, &to);
	for (uint32_t i = 0; i < RIG_BLOCKS; i++) {
		struct rig_block *came = &x->a.blocks[i], *sent = &x->b.blocks[i];

		CHECK(!src_set_block(x->b.src, i, sent->id, (uintptr_t)came->dst, sent->bytes, sent->page_size,
				     (uintptr_t)sent->dirty));
		bitmap_clear(sent->dirty, 0, sent->pages);
		x->wanted[i] = rig_bits(sent->pages);
		CHECK(!src_set_wanted(x->b.src, i, (uintptr_t)x->wanted[i]));
	}
	src_set_upstream(x->b.src, x->a.dst);
	src_set_more_coming(x->b.src, true);
	dst_set_sink(x->a.dst, x->b.src);
	dst_start_postcopy(x->a.dst, -1, x->a.stop_fd, -1, 0, 0, 0);
}

static void test_relay(bool urgent)
{
	struct relay x;

	relay_init(&x, urgent);
	x.a.o.no_package = true;
	rig_start_source(&x.a);
	while (!atomic_load(&x.a.src->postcopy))
		sched_yield();		/* a request before that is an error */
	CHECK(!pthread_create(&x.sink, NULL, sink_thread, &x));
	rig_start(&x.b);
	pthread_join(x.b.main, NULL);
	/* a pushes nothing by itself: what the guest touches has come through both legs. */
	rig_join_touchers(&x.b);
	src_set_hold(x.a.src, false);
	pthread_join(x.sink, NULL);
	CHECK(x.sink_ret == DST_EOF && dst_missing_pages(x.a.dst) == 0);
	rig_join_listen(&x.b);
	CHECK(x.b.listen_ret == DST_EOF);
	rig_join_source(&x.b);
	CHECK(x.b.migration_ret == 0 && x.b.return_path_ret == SRC_RP_SHUT);
	rig_check_all(&x.b);
	rig_stop_fault(&x.b);
	src_stop(x.a.src);
	rig_join_source(&x.a);
	CHECK(x.a.migration_ret == 0);
	rig_deinit(&x.b);
	rig_deinit(&x.a);
	for (uint32_t i = 0; i < RIG_BLOCKS; i++)
		free(x.wanted[i]);
}

void streams_run(void)
{
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		test_case(&cases[i]);
	test_urgent_end(false);
	test_urgent_end(true);
	if (!rig_missing(RIG_HUGETLB)) {
		test_poison_of_half_a_page();
		test_dry_pool();
	}
	for (int round = 0; round < 4; round++)
		test_relay(round % 2);
}
