// SPDX-License-Identifier: MIT
/* The channel: every kind of read of random pieces, every flipped bit and cut of frames, and its abort. */
#define _GNU_SOURCE
#include "migration_rig.h"

#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

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
	rig_noise(data, len);
	feed = (struct feed){ e.c[0], data, len };
	CHECK(!pthread_create(&thread, NULL, feed_thread, &feed));
	while (at < len) {
		size_t want = rig_random() % (rig_random() % 4 ? 300 : CHAN_NEED_MAX) + 1;
		int64_t n = 0;

		if (want > len - at)
			want = len - at;
		switch (rig_random() % 4) {
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

	rig_noise(data, sizeof(data));
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
		CHECK(!pipe2(in, O_CLOEXEC | O_NONBLOCK) && !pipe2(out, O_CLOEXEC | O_NONBLOCK));
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

void channel_run(void)
{
	test_channel(false);
	test_channel(true);
	test_frame_damage();
	test_frames_begin();
	test_abort(false);
	test_abort(true);
}
