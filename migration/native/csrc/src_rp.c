/* The return path on the source: requests into the ring, PONGs to whoever waits, SHUT to the end. */
#include "src.h"

#include "be.h"

#include <errno.h>
#include <time.h>

enum { RP_SHUT = 1, RP_PONG = 2, RP_REQ_PAGES_ID = 3, RP_REQ_PAGES = 4 };
enum { PACKAGE_PONG = 3 };

#define MESSAGE_MAX 512u

static int bad(struct src *s, const char *what, uint64_t value)
{
	return mig_fail(&s->rp_error, EBADMSG, s->ch->rpos, "return path", "%s (%#llx)", what,
			(unsigned long long)value);
}

static int cut(struct src *s, int ret)
{
	if (s->ch->rerror.code) {
		s->rp_error = s->ch->rerror;
		return ret;
	}
	if (ret == -ENODATA)
		return mig_fail(&s->rp_error, EPIPE, s->ch->rpos, "return path",
				"the destination closed the return path");
	return mig_fail(&s->rp_error, -ret, s->ch->rpos, "return path", "%s",
			ret == -ECANCELED ? "stopped" : strerror(-ret));
}

/* From the block asked for last on: neighbours are asked for together. */
static int named_block(struct src *s, const uint8_t *name, uint32_t len)
{
	uint32_t i = s->last_requested_block < s->block_count ? s->last_requested_block : 0;

	for (uint32_t tried = 0; tried < s->block_count; tried++, i++) {
		const struct src_block *b = &s->blocks[i < s->block_count ? i : (i = 0)];

		if (b->id_len == len && !memcmp(b->idstr, name, len))
			return (int)i;
	}
	return -ENOENT;
}

static int serving_failed(struct src *s, int ret)
{
	const struct src_tx *tx = s->urgent_error.code ? &s->urgent : &s->main;

	chan_lock(tx->ch);
	ret = mig_fail(&s->rp_error, -ret, tx->ch->wpos, "return path", "answering a request: %s",
		       tx == &s->main ? s->error.message : s->urgent_error.message);
	chan_unlock(tx->ch);
	return ret;
}

/* An idle stream is ours for the taking; a busy one is looked after by its owner. */
int src_serve_or_leave(struct src *s)
{
	int ret = s->urgent.ch ? src_serve_urgent(s) : 0;

	if (ret < 0)
		return serving_failed(s, ret);
	while ((!s->urgent.ch && atomic_load(&s->ring_head) != atomic_load(&s->ring_tail)) ||
	       atomic_load(&s->run_due)) {
		if (!chan_trylock(s->ch)) {
			src_kick(s);
			return 0;
		}
		__atomic_fetch_add(&s->stats.served_direct, 1, __ATOMIC_RELAXED);
		ret = src_serve_locked(s);
		chan_unlock(s->ch);
		if (ret < 0)
			return serving_failed(s, ret);
	}
	return 0;
}

static void note(struct src *s, const struct src_request *r)
{
	uint64_t n = atomic_load_explicit(&s->log_count, memory_order_relaxed);
	struct timespec t;

	if (!s->log || n >= s->log_capacity)
		return;
	clock_gettime(CLOCK_MONOTONIC, &t);
	s->log[n] = (struct src_log_entry){
		.block = r->block,
		.count = (uint32_t)r->count,
		.first = r->first,
		.ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec - s->package_ns,
	};
	atomic_store_explicit(&s->log_count, n + 1, memory_order_release);
}

static int request(struct src *s, const uint8_t *payload, uint32_t len, bool named)
{
	struct src_request r;
	const struct src_block *b;
	uint64_t start = get_be64(payload);
	uint32_t length = get_be32(payload + 8);
	int index = (int)s->last_requested_block;

	if (named) {
		if (len != 13u + payload[12])
			return bad(s, "a page request of another length than its name says", len);
		index = named_block(s, payload + 13, payload[12]);
		if (index < 0)
			return mig_fail(&s->rp_error, EBADMSG, s->ch->rpos, "return path",
					"a page request for unknown block '%.*s'", payload[12], payload + 13);
		s->last_requested_block = (uint32_t)index;
	} else if (s->last_requested_block == SRC_NO_BLOCK) {
		return bad(s, "a page request names no block, and none before it did", start);
	}
	b = &s->blocks[index];
	if (!length || (start | length) % RAM_PAGE_BYTES)
		return bad(s, "a page request that is not page aligned", start | length);
	if (start >= b->used_length || length > b->used_length - start)
		return bad(s, "a page request beyond the end of its block", start);
	if (!s->postcopy)
		return bad(s, "a page request before postcopy began", start);
	r.block = (uint32_t)index;
	r.first = start >> RAM_PAGE_BITS;
	r.count = length >> RAM_PAGE_BITS;
	__atomic_fetch_add(&s->stats.requests, 1, __ATOMIC_RELAXED);
	note(s, &r);
	while (src_push_request(s, &r) < 0) {
		/* A full ring (a peer that floods): wait for the stream, which also slows the peer. */
		int ret;

		if (s->urgent.ch) {
			ret = src_serve_urgent(s);
		} else {
			chan_lock(s->ch);
			ret = src_serve_locked(s);
			chan_unlock(s->ch);
		}
		if (ret < 0)
			return serving_failed(s, ret);
	}
	return src_serve_or_leave(s);
}

static int pong(struct src *s, uint32_t value)
{
	pthread_mutex_lock(&s->pong_lock);
	s->pongs[s->pong_count++ % SRC_PONGS] = value;
	if (value == PACKAGE_PONG)
		s->loading = false;
	pthread_cond_broadcast(&s->pong_cond);
	pthread_mutex_unlock(&s->pong_lock);
	if (value == PACKAGE_PONG) {
		if (!atomic_load(&s->run_wanted))
			atomic_store(&s->moved, true);	/* no SHUT brings the guest back now */
		src_kick(s);
	}
	if (value == PACKAGE_PONG && atomic_load(&s->run_wanted) && !atomic_load(&s->run_sent)) {
		atomic_store(&s->run_due, true);
		src_kick(s);
		return src_serve_or_leave(s);
	}
	return 0;
}

/* The message is whole in the window. 0: handled; 1: SHUT; 2: Python's; -errno. */
static int message(struct src *s, uint16_t type, uint16_t len)
{
	const uint8_t *payload = s->ch->win + 4;
	uint32_t value = 0;
	int ret;

	switch (type) {
	case RP_SHUT:
		if (len != 4)
			return bad(s, "a SHUT of wrong length", len);
		s->shut_value = get_be32(payload);
		atomic_store(&s->shut_received, true);
		chan_skip(s->ch, 4u + len);
		return 1;
	case RP_PONG:
		if (len != 4)
			return bad(s, "a PONG of wrong length", len);
		value = get_be32(payload);
		ret = pong(s, value);
		break;
	case RP_REQ_PAGES:
		if (len != 12)
			return bad(s, "a page request of wrong length", len);
		ret = request(s, payload, len, false);
		break;
	case RP_REQ_PAGES_ID:
		if (len < 14)
			return bad(s, "a page request of wrong length", len);
		ret = request(s, payload, len, true);
		break;
	default:
		return 2;
	}
	if (ret < 0)
		return ret;
	chan_skip(s->ch, 4u + len);
	if (value && value == atomic_load(&s->frame_after_pong)) {
		atomic_store(&s->frame_after_pong, 0);
		chan_set_read_framed(s->ch);
	}
	return 0;
}

static int one_message(struct src *s)
{
	uint16_t type, len;
	int ret = chan_need(s->ch, 4);

	if (ret < 0)
		return cut(s, ret);
	type = get_be16(s->ch->win);
	len = get_be16(s->ch->win + 2);
	if (!type || len > MESSAGE_MAX)
		return bad(s, "no return-path message starts here", (uint64_t)type << 16 | len);
	ret = chan_need(s->ch, 4u + len);
	if (ret < 0)
		return cut(s, ret);
	return message(s, type, len);
}

int src_rp_loop(struct src *s)
{
	int ret;

	do {
		ret = one_message(s);
	} while (!ret);
	if (ret == 2)
		return SRC_RP_MESSAGE;
	pthread_mutex_lock(&s->pong_lock);
	s->rp_ended = true;
	pthread_cond_broadcast(&s->pong_cond);
	pthread_mutex_unlock(&s->pong_lock);
	src_kick(s);
	return ret == 1 ? SRC_RP_SHUT : ret;
}
