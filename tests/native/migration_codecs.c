// SPDX-License-Identifier: MIT
/* Codecs and the channel: round trips, every split, every flipped bit, garbage in guarded buffers. */
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

static uint64_t next(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	return rng ^= rng << 17;
}

static void noise(uint8_t *to, size_t n)
{
	while (n--)
		*to++ = (uint8_t)next();
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
		uint32_t seed = (uint32_t)next();

		noise(buf, n);
		CHECK(crc32c(seed, buf, n) == crc32c_portable(seed, buf, n));
		CHECK(crc32c(crc32c(seed, buf, n / 3), buf + n / 3, n - n / 3) == crc32c(seed, buf, n));
	}
}

static void test_pagesum(void)
{
	uint8_t *ram = guarded(3 * PAGE);
	uint32_t with_hole;

	noise(ram, 3 * PAGE);
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
		unsigned int edits = (unsigned int)(next() % 40);
		size_t cap = next() % 2 ? PAGE : next() % 200;
		int n;

		noise(old, PAGE);
		memcpy(new, old, PAGE);
		while (edits--) {
			size_t at = next() % PAGE, len = next() % 120;

			noise(new + at, len < PAGE - at ? len : PAGE - at);
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
		size_t n = next() % 64;
		uint8_t *in = guarded(n);
		int ret;

		noise(in, n);
		for (size_t i = 0; i < n && next() % 3; i += 2)
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
		uint64_t offset = (next() >> 12) << 12;
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
		size_t n = next() % (RAM_HEAD_MAX + 1);
		uint8_t *buf = guarded(n);
		struct ramrec r, again;
		int ret, more;

		noise(buf, n);
		if (n >= 8 && next() % 2) {	/* one flag that exists */
			buf[6] = (uint8_t)(buf[6] & 0xf0) | (uint8_t)(next() % 4);
			buf[7] = (uint8_t)(1u << next() % 8);
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

/* -- the channel --------------------------------------------------------------------------------------- */

struct ends {
	int fds[2];
	struct chan *c[2];
};

static void ends_init(struct ends *e, bool framed)
{
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, e->fds));
	for (int i = 0; i < 2; i++) {
		int err;

		e->c[i] = chan_new(e->fds[i], e->fds[i], true, &err);
		CHECK(e->c[i]);
		if (framed) {
			chan_set_read_framed(e->c[i]);
			CHECK(!chan_set_write_framed(e->c[i]));
		}
	}
}

static void ends_deinit(struct ends *e)
{
	for (int i = 0; i < 2; i++) {
		chan_free(e->c[i]);
		close(e->fds[i]);
	}
}

struct feed {
	struct chan *c;
	const uint8_t *data;
	size_t len;
};

static void *feed_thread(void *feed)
{
	const struct feed *f = feed;
	uint64_t x = 1;

	for (size_t at = 0, n; at < f->len; at += n) {
		x = x * 6364136223846793005u + 1;
		n = 1 + (x >> 33) % 70000;
		if (n > f->len - at)
			n = f->len - at;
		CHECK(!chan_write(f->c, f->data + at, n));
		if (x >> 63)
			CHECK(!chan_flush(f->c));
	}
	CHECK(!chan_flush(f->c));
	shutdown(f->c->wfd, SHUT_WR);
	return NULL;
}

/* Megabytes in random pieces, read back by every kind of read. */
static void test_channel(bool framed)
{
	size_t len = 3u << 20, at = 0;
	uint8_t *data = rig_alloc(len), *got = rig_alloc(len);
	struct feed feed;
	pthread_t thread;
	struct ends e;

	ends_init(&e, framed);
	noise(data, len);
	feed = (struct feed){ e.c[0], data, len };
	CHECK(!pthread_create(&thread, NULL, feed_thread, &feed));
	while (at < len) {
		size_t want = next() % (next() % 4 ? 300 : CHAN_NEED_MAX) + 1;
		int64_t n = 0;

		if (want > len - at)
			want = len - at;
		switch (next() % 4) {
		case 0:
			CHECK(chan_read(e.c[1], got + at, want) == 0);
			n = (int64_t)want;
			break;
		case 1:
			n = chan_read_some(e.c[1], got + at, want);
			CHECK(n > 0 && n <= (int64_t)want);
			break;
		case 2:
			CHECK(chan_peek(e.c[1], got + at, want) == (int64_t)want);
			CHECK(!memcmp(got + at, data + at, want));
			break;
		default:
			CHECK(chan_need(e.c[1], want) == 0 && e.c[1]->win_len >= want);
			memcpy(got + at, e.c[1]->win, want);
			chan_skip(e.c[1], want);
			n = (int64_t)want;
		}
		at += (size_t)n;
		CHECK(chan_read_position(e.c[1]) == at);
	}
	CHECK(!memcmp(got, data, len));
	CHECK(chan_peek(e.c[1], got, 1) == 0 && chan_read(e.c[1], got, 1) == -ENODATA);
	pthread_join(thread, NULL);
	ends_deinit(&e);
	free(data);
	free(got);
}

/* A whole framed stream as bytes. Returns the length. */
static size_t record_frames(uint8_t *to, size_t room, const uint8_t *data, const size_t *lengths, int count)
{
	struct ends e;
	size_t at = 0;
	ssize_t n;

	ends_init(&e, true);
	for (int i = 0; i < count; i++) {
		CHECK(!chan_write(e.c[0], data + at, lengths[i]) && !chan_flush(e.c[0]));
		at += lengths[i];
	}
	shutdown(e.fds[0], SHUT_WR);
	for (at = 0; (n = recv(e.fds[1], to + at, room - at, 0)) > 0;)
		at += (size_t)n;
	ends_deinit(&e);
	return at;
}

/* Feed bytes to a framed reader: how many checked bytes came out, and how it ended. */
static size_t read_frames(const uint8_t *wire, size_t n, uint8_t *out, size_t room, int *end)
{
	size_t got = 0;
	struct ends e;

	ends_init(&e, true);
	CHECK(send(e.fds[0], wire, n, MSG_NOSIGNAL) == (ssize_t)n);
	shutdown(e.fds[0], SHUT_WR);
	for (;;) {
		int64_t ret = chan_read_some(e.c[1], out + got, room - got);

		if (ret <= 0) {
			*end = (int)ret;
			CHECK(ret == -ENODATA || e.c[1]->rerror.code == -ret);
			ends_deinit(&e);
			return got;
		}
		got += (size_t)ret;
	}
}

static void test_frame_damage(void)
{
	static const size_t lengths[3] = { 40, 1, 23 };
	const size_t starts[4] = { 0, 48, 57, 88 };
	uint8_t data[64], wire[128], bad[176], out[200];
	size_t n;
	int end;

	noise(data, sizeof(data));
	n = record_frames(wire, sizeof(wire), data, lengths, 3);
	CHECK(n == starts[3]);
	CHECK(read_frames(wire, n, out, sizeof(out), &end) == 64 && end == -ENODATA);
	CHECK(!memcmp(out, data, 64));
	for (size_t bit = 0; bit < n * 8; bit++) {
		size_t frame = bit / 8 < starts[1] ? 0 : bit / 8 < starts[2] ? 1 : 2;
		size_t whole = frame == 0 ? 0 : frame == 1 ? 40 : 41;

		memcpy(bad, wire, n);
		bad[bit / 8] ^= (uint8_t)(1u << bit % 8);
		CHECK(read_frames(bad, n, out, sizeof(out), &end) == whole);
		CHECK(end == -EBADMSG || end == -EPIPE);
		CHECK(!memcmp(out, data, whole));
	}
	for (size_t cut = 0; cut < n; cut++) {
		bool between = cut == 0 || cut == starts[1] || cut == starts[2];

		read_frames(wire, cut, out, sizeof(out), &end);
		CHECK(end == (between ? -ENODATA : -EPIPE));
	}
	/* Lost, repeated, exchanged: the sums are right, the sequence is not. */
	CHECK(read_frames(wire + starts[1], n - starts[1], out, sizeof(out), &end) == 0 && end == -EBADMSG);
	memcpy(bad, wire, starts[1]);
	memcpy(bad + starts[1], wire, n);
	CHECK(read_frames(bad, n + starts[1], out, sizeof(out), &end) == 40 && end == -EBADMSG);
	memcpy(bad, wire + starts[1], starts[2] - starts[1]);
	memcpy(bad + starts[2] - starts[1], wire, starts[1]);
	CHECK(read_frames(bad, starts[2], out, sizeof(out), &end) == 0 && end == -EBADMSG);
}

/* Switched in mid-stream, with bytes of both kinds already in the reader's buffer. */
static void test_frames_begin(void)
{
	uint8_t got[16];
	struct ends e;

	ends_init(&e, false);
	CHECK(!chan_write(e.c[0], "plain", 5) && !chan_set_write_framed(e.c[0]));
	CHECK(!chan_write(e.c[0], "framed", 6) && !chan_flush(e.c[0]));
	CHECK(!chan_read(e.c[1], got, 5) && !memcmp(got, "plain", 5));
	chan_set_read_framed(e.c[1]);
	CHECK(!chan_read(e.c[1], got, 6) && !memcmp(got, "framed", 6));
	CHECK(chan_read_position(e.c[1]) == 11 && chan_write_position(e.c[0]) == 11);
	ends_deinit(&e);
}

static void *read_thread(void *c)
{
	uint8_t byte;

	CHECK(chan_read(c, &byte, 1) == -ECANCELED);
	return NULL;
}

static void *write_thread(void *c)
{
	uint8_t *much = rig_alloc(CHAN_FRAME_MAX);
	int ret;

	do {
		ret = chan_write(c, much, CHAN_FRAME_MAX);
	} while (!ret);
	CHECK(ret == -ECANCELED && chan_flush(c) == -ECANCELED);
	free(much);
	return NULL;
}

/* A reader and a writer asleep in it return, on a socket and on pipes. */
static void test_abort(bool pipes)
{
	pthread_t reader, writer;
	int in[2], out[2], err;
	struct chan *c;

	if (pipes)
		CHECK(!pipe2(in, 02000000 | 04000) && !pipe2(out, 02000000 | 04000));	/* CLOEXEC NONBLOCK */
	else
		CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, in) && !socketpair(AF_UNIX, SOCK_STREAM, 0, out));
	c = chan_new(in[0], pipes ? out[1] : in[0], !pipes, &err);
	CHECK(c);
	CHECK(!pthread_create(&reader, NULL, read_thread, c));
	CHECK(!pthread_create(&writer, NULL, write_thread, c));
	while (chan_bytes_sent(c) < (32u << 10))
		sched_yield();
	chan_abort(c);
	pthread_join(reader, NULL);
	pthread_join(writer, NULL);
	chan_free(c);
	for (int i = 0; i < 2; i++) {
		close(in[i]);
		close(out[i]);
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
	test_channel(false);
	test_channel(true);
	test_frame_damage();
	test_frames_begin();
	test_abort(false);
	test_abort(true);
}
