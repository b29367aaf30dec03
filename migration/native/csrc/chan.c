#include "chan.h"

#include "be.h"
#include "crc32c.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define RAW_CAP (256u << 10)
#ifndef READ_CHUNK
#define READ_CHUNK (32u << 10)
#endif
#define SPILL_CAP (CHAN_NEED_MAX + CHAN_FRAME_MAX)

_Static_assert(RAW_CAP >= CHAN_FRAME_MAX + CHAN_FRAME_HEADER, "a frame fits the raw buffer");
_Static_assert(RAW_CAP >= 2 * CHAN_NEED_MAX, "a need fits the raw buffer");

struct chan *chan_new(int rfd, int wfd, bool is_socket, int *err)
{
	struct chan *c = calloc(1, sizeof(*c));

	*err = -ENOMEM;
	if (!c)
		return NULL;
	c->rfd = rfd;
	c->wfd = wfd;
	c->is_socket = is_socket;
	c->raw_cap = RAW_CAP;
	c->raw = malloc(RAW_CAP);
	c->spill = malloc(SPILL_CAP);
	c->wbuf = malloc(CHAN_FRAME_HEADER + CHAN_FRAME_MAX);
	c->abort_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	c->win = c->raw;
	pthread_mutex_init(&c->wlock, NULL);
	if (!c->raw || !c->spill || !c->wbuf || c->abort_fd < 0) {
		if (c->abort_fd < 0)
			*err = -errno;
		chan_free(c);
		return NULL;
	}
	*err = 0;
	return c;
}

void chan_free(struct chan *c)
{
	if (!c)
		return;
	if (c->abort_fd >= 0)
		close(c->abort_fd);
	pthread_mutex_destroy(&c->wlock);
	free(c->wbuf);
	free(c->spill);
	free(c->raw);
	free(c);
}

void chan_abort(struct chan *c)
{
	uint64_t one = 1;
	ssize_t ignored;

	atomic_store(&c->aborted, true);
	ignored = write(c->abort_fd, &one, sizeof(one));
	(void)ignored;
	if (c->is_socket)
		shutdown(c->rfd, SHUT_RDWR);
}

/* Wait until fd is ready; sockets block in the call itself and are shut down instead. */
static int wait_ready(struct chan *c, int fd, short events)
{
	struct pollfd p[2] = { { .fd = fd, .events = events }, { .fd = c->abort_fd, .events = POLLIN } };

	for (;;) {
		if (poll(p, 2, -1) < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		if (p[1].revents || atomic_load(&c->aborted))
			return -ECANCELED;
		if (p[0].revents)
			return 0;
	}
}

static int64_t receive_some(struct chan *c, uint8_t *buf, size_t n)
{
	for (;;) {
		ssize_t got;

		if (atomic_load_explicit(&c->aborted, memory_order_relaxed))
			return -ECANCELED;
		if (c->is_socket) {
			got = recv(c->rfd, buf, n, 0);
		} else {
			int ret = wait_ready(c, c->rfd, POLLIN);

			if (ret < 0)
				return ret;
			got = read(c->rfd, buf, n);
		}
		if (got > 0) {
			atomic_fetch_add_explicit(&c->received, (uint64_t)got, memory_order_relaxed);
			return got;
		}
		if (atomic_load(&c->aborted))
			return -ECANCELED;
		if (got == 0)
			return -ENODATA;
		if (errno != EINTR && errno != EAGAIN)
			return -errno;
		if (errno == EAGAIN && c->is_socket) {
			int ret = wait_ready(c, c->rfd, POLLIN);

			if (ret < 0)
				return ret;
		}
	}
}

/* At least n unread raw bytes from raw_head on. The window must not lie in raw when this moves it. */
static int raw_fill(struct chan *c, size_t n)
{
	if (c->raw_head == c->raw_tail)
		c->raw_head = c->raw_tail = 0;
	if (c->raw_head + n > c->raw_cap) {
		memmove(c->raw, c->raw + c->raw_head, c->raw_tail - c->raw_head);
		c->raw_tail -= c->raw_head;
		c->raw_head = 0;
	}
	while (c->raw_tail - c->raw_head < n) {
		size_t missing = n - (c->raw_tail - c->raw_head);
		size_t room = c->raw_cap - c->raw_tail;
		size_t chunk = missing > READ_CHUNK ? missing : READ_CHUNK;
		int64_t got = receive_some(c, c->raw + c->raw_tail, chunk < room ? chunk : room);

		if (got < 0)
			return (int)got;
		c->raw_tail += (size_t)got;
	}
	return 0;
}

static int need_plain(struct chan *c, size_t n)
{
	int ret;

	/* The window is the whole of the raw bytes: give it back, fill, take it again. */
	c->raw_head = c->raw_tail - c->win_len;
	ret = raw_fill(c, n);
	c->win = c->raw + c->raw_head;
	c->win_len = c->raw_tail - c->raw_head;
	c->raw_head = c->raw_tail;
	return ret;
}

/* Check the next frame; its payload is at *payload and raw_head is past it. */
static int next_frame(struct chan *c, const uint8_t **payload, uint32_t *length)
{
	uint8_t seed[12];
	uint32_t len, want, have;
	int ret = raw_fill(c, CHAN_FRAME_HEADER);

	if (ret == -ENODATA && c->raw_tail != c->raw_head)
		return mig_fail(&c->rerror, EPIPE, c->rpos, "frame",
				"the stream ends inside the header of frame %llu",
				(unsigned long long)c->rseq);
	if (ret < 0)
		return ret;
	len = get_be32(c->raw + c->raw_head);
	want = get_be32(c->raw + c->raw_head + 4);
	if (!len || len > CHAN_FRAME_MAX)
		return mig_fail(&c->rerror, EBADMSG, c->rpos, "frame",
				"frame %llu announces %u bytes (1..%u): not a frame header",
				(unsigned long long)c->rseq, len, CHAN_FRAME_MAX);
	ret = raw_fill(c, CHAN_FRAME_HEADER + len);
	if (ret == -ENODATA)
		return mig_fail(&c->rerror, EPIPE, c->rpos, "frame",
				"the stream ends inside frame %llu of %u bytes",
				(unsigned long long)c->rseq, len);
	if (ret < 0)
		return ret;
	*payload = c->raw + c->raw_head + CHAN_FRAME_HEADER;
	put_be64(seed, c->rseq);
	put_be32(seed + 8, len);
	have = crc32c(crc32c(0, seed, sizeof(seed)), *payload, len);
	if (have != want)
		return mig_fail(&c->rerror, EBADMSG, c->rpos, "frame",
				"checksum of frame %llu (%u bytes) is %08x, sent %08x: bytes were changed, "
				"lost or repeated on the way",
				(unsigned long long)c->rseq, len, have, want);
	c->rseq++;
	c->raw_head += CHAN_FRAME_HEADER + len;
	*length = len;
	return 0;
}

static int need_framed(struct chan *c, size_t n)
{
	while (c->win_len < n) {
		const uint8_t *payload = NULL;
		uint32_t len = 0;
		int ret;

		if (c->win_len) {
			memmove(c->spill, c->win, c->win_len);
			c->win = c->spill;
		}
		ret = next_frame(c, &payload, &len);
		if (ret < 0)
			return ret;
		if (!c->win_len) {
			c->win = payload;
		} else {
			memcpy(c->spill + c->win_len, payload, len);
		}
		c->win_len += len;
	}
	return 0;
}

int chan_need(struct chan *c, size_t n)
{
	if (c->win_len >= n)
		return 0;
	if (n > CHAN_NEED_MAX)
		return -EINVAL;
	return c->rframed ? need_framed(c, n) : need_plain(c, n);
}

void chan_set_read_framed(struct chan *c)
{
	c->raw_head = c->raw_tail - c->win_len;
	c->win_len = 0;
	c->rframed = true;
	c->rseq = 0;
}

int chan_read(struct chan *c, void *buf, size_t n)
{
	uint8_t *to = buf;

	while (n) {
		size_t take;

		if (!c->win_len) {
			int ret = chan_need(c, 1);

			if (ret < 0)
				return ret;
		}
		take = n < c->win_len ? n : c->win_len;
		memcpy(to, c->win, take);
		chan_skip(c, take);
		to += take;
		n -= take;
	}
	return 0;
}

int64_t chan_read_some(struct chan *c, void *buf, size_t n)
{
	int ret = chan_need(c, 1);

	if (ret < 0)
		return ret;
	if (n > c->win_len)
		n = c->win_len;
	memcpy(buf, c->win, n);
	chan_skip(c, n);
	return (int64_t)n;
}

int64_t chan_peek(struct chan *c, void *buf, size_t n)
{
	int ret = chan_need(c, n);

	if (ret < 0 && ret != -ENODATA)
		return ret;
	if (n > c->win_len)
		n = c->win_len;
	memcpy(buf, c->win, n);
	return (int64_t)n;
}

static int send_all(struct chan *c, const uint8_t *p, size_t n)
{
	while (n) {
		ssize_t put;

		if (atomic_load_explicit(&c->aborted, memory_order_relaxed))
			return -ECANCELED;
		if (c->is_socket) {
			put = send(c->wfd, p, n, MSG_NOSIGNAL);
		} else {
			int ret = wait_ready(c, c->wfd, POLLOUT);

			if (ret < 0)
				return ret;
			put = write(c->wfd, p, n);
		}
		if (put < 0) {
			int ret;

			if (errno == EINTR)
				continue;
			if (atomic_load(&c->aborted))
				return -ECANCELED;
			if (errno != EAGAIN)
				return -errno;
			ret = wait_ready(c, c->wfd, POLLOUT);
			if (ret < 0)
				return ret;
			continue;
		}
		atomic_fetch_add_explicit(&c->sent, (uint64_t)put, memory_order_relaxed);
		p += put;
		n -= (size_t)put;
	}
	return 0;
}

int chan_flush_locked(struct chan *c)
{
	uint8_t *payload = c->wbuf + CHAN_FRAME_HEADER;
	int ret;

	if (c->werror || !c->wlen)
		return c->werror;
	if (c->wframed) {
		uint8_t seed[12];

		put_be64(seed, c->wseq++);
		put_be32(seed + 8, (uint32_t)c->wlen);
		put_be32(c->wbuf, (uint32_t)c->wlen);
		put_be32(c->wbuf + 4, crc32c(crc32c(0, seed, sizeof(seed)), payload, c->wlen));
		ret = send_all(c, c->wbuf, CHAN_FRAME_HEADER + c->wlen);
	} else {
		ret = send_all(c, payload, c->wlen);
	}
	c->wlen = 0;
	if (ret < 0)
		c->werror = ret;
	return ret;
}

uint8_t *chan_reserve(struct chan *c, size_t n)
{
	if (c->werror || n > CHAN_FRAME_MAX)
		return NULL;
	if (c->wlen + n > CHAN_FRAME_MAX && chan_flush_locked(c) < 0)
		return NULL;
	return c->wbuf + CHAN_FRAME_HEADER + c->wlen;
}

int chan_put_locked(struct chan *c, const void *data, size_t n)
{
	const uint8_t *from = data;

	while (n) {
		size_t take = CHAN_FRAME_MAX - c->wlen;
		uint8_t *to;

		if (take > n)
			take = n;
		if (!take)
			take = n < CHAN_FRAME_MAX ? n : CHAN_FRAME_MAX;
		to = chan_reserve(c, take);
		if (!to)
			return c->werror;
		memcpy(to, from, take);
		chan_commit(c, take);
		from += take;
		n -= take;
	}
	return c->werror;
}

/* Drop the first n bytes of what is left to send. */
static void skip_pieces(struct iovec **pieces, int *count, size_t n)
{
	while (*count && n >= (*pieces)->iov_len) {
		n -= (*pieces)->iov_len;
		(*pieces)++;
		(*count)--;
	}
	if (*count) {
		(*pieces)->iov_base = (uint8_t *)(*pieces)->iov_base + n;
		(*pieces)->iov_len -= n;
	}
}

static int send_pieces(struct chan *c, struct iovec *pieces, int count)
{
	while (count) {
		struct msghdr msg = { .msg_iov = pieces, .msg_iovlen = (size_t)count };
		ssize_t put;

		if (atomic_load_explicit(&c->aborted, memory_order_relaxed))
			return -ECANCELED;
		put = sendmsg(c->wfd, &msg, MSG_NOSIGNAL);
		if (put < 0) {
			if (errno == EINTR)
				continue;
			return atomic_load(&c->aborted) ? -ECANCELED : -errno;
		}
		atomic_fetch_add_explicit(&c->sent, (uint64_t)put, memory_order_relaxed);
		c->wpos += (uint64_t)put;
		skip_pieces(&pieces, &count, (size_t)put);
	}
	return 0;
}

int chan_send_pieces_locked(struct chan *c, struct iovec *pieces, int count)
{
	int ret = 0;

	if (!c->wframed) {
		ret = chan_flush_locked(c);
		if (!ret)
			ret = send_pieces(c, pieces, count);
		if (ret < 0)
			c->werror = ret;
		return ret;
	}
	for (int i = 0; i < count && !ret; i++)
		ret = chan_put_locked(c, pieces[i].iov_base, pieces[i].iov_len);
	return ret ? ret : chan_flush_locked(c);
}

void chan_lock(struct chan *c)
{
	pthread_mutex_lock(&c->wlock);
}

bool chan_trylock(struct chan *c)
{
	return pthread_mutex_trylock(&c->wlock) == 0;
}

void chan_unlock(struct chan *c)
{
	pthread_mutex_unlock(&c->wlock);
}

int chan_set_write_framed(struct chan *c)
{
	int ret;

	chan_lock(c);
	ret = chan_flush_locked(c);
	c->wframed = true;
	c->wseq = 0;
	chan_unlock(c);
	return ret;
}

int chan_write(struct chan *c, const void *data, size_t n)
{
	int ret;

	chan_lock(c);
	ret = chan_put_locked(c, data, n);
	chan_unlock(c);
	return ret;
}

int chan_flush(struct chan *c)
{
	int ret;

	chan_lock(c);
	ret = chan_flush_locked(c);
	chan_unlock(c);
	return ret;
}

uint64_t chan_read_position(const struct chan *c)
{
	return c->rpos;
}

uint64_t chan_write_position(const struct chan *c)
{
	return c->wpos;
}

uint64_t chan_bytes_received(const struct chan *c)
{
	return atomic_load_explicit(&c->received, memory_order_relaxed);
}

uint64_t chan_bytes_sent(const struct chan *c)
{
	return atomic_load_explicit(&c->sent, memory_order_relaxed);
}
