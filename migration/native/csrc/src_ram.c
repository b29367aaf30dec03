/* Pages out: the scan, and requested pages before it. Everything here runs under the channel's lock. */
#include "src.h"

#include "be.h"
#include "bitmap.h"
#include "zero.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { TYPE_PART = 2, TYPE_END = 3, TYPE_COMMAND = 8, TYPE_FOOTER = 0x7e };
enum { CMD_RUN = 5 };

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int channel_error(struct src *s, const struct src_tx *tx)
{
	struct mig_error *e = tx == &s->main ? &s->error : &s->urgent_error;
	int code = -tx->ch->werror;

	return mig_fail(e, code ? code : EIO, tx->ch->wpos, "ram", "writing the channel: %s",
			code == ECANCELED ? "stopped" : strerror(code ? code : EIO));
}

static void count(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

/* The bit went down before the page is read: a write during the read makes it dirty again. */
static int put_page(struct src *s, struct src_tx *tx, uint32_t index, uint64_t page)
{
	struct src_block *b = &s->blocks[index];
	uint64_t offset = page << RAM_PAGE_BITS;
	const uint8_t *data = b->host + offset;
	const char *id = tx->last_block == index ? NULL : b->idstr;
	int zero = atomic_load_explicit(&s->zero, memory_order_relaxed);
	bool over_multifd = s->multifd && src_multifd_takes(s);
	bool is_zero = false;
	uint8_t *out;
	size_t n;

	if (zero == SRC_ZERO_RECORD || (zero == SRC_ZERO_MULTIFD && !over_multifd))
		is_zero = buffer_is_zero(data, RAM_PAGE_BYTES);
	if (over_multifd && !is_zero)
		return src_multifd_put(s, index, page);
	out = chan_reserve(tx->ch, RAM_HEAD_MAX + RAM_PAGE_BYTES);
	if (!out)
		return channel_error(s, tx);
	if (is_zero && s->xb_pages)
		src_xbzrle_zero(s, index, page);
	if (!is_zero && s->xb_active && !atomic_load_explicit(&s->postcopy, memory_order_relaxed)) {
		int ret = src_xbzrle_put(s, tx, index, page);

		if (ret)
			return ret < 0 ? channel_error(s, tx) : 0;
	}
	n = ramrec_encode(out, offset, is_zero ? RAM_FLAG_ZERO : RAM_FLAG_PAGE, id, b->id_len);
	if (is_zero) {
		out[n++] = 0;
	} else {
		memcpy(out + n, data, RAM_PAGE_BYTES);
		n += RAM_PAGE_BYTES;
	}
	count(is_zero ? &s->stats.pages_zero : &s->stats.pages_normal, 1);
	chan_commit(tx->ch, n);
	tx->last_block = index;
	if (atomic_load_explicit(&s->postcopy, memory_order_relaxed))
		count(&s->stats.postcopy_pages, 1);
	return 0;
}

/* True: the page is ours to send now. */
static bool take_page(struct src_block *b, uint64_t page)
{
	bool was_dirty = bitmap_test_and_clear(b->dirty, page);

	if (b->scan != b->dirty)
		bitmap_test_and_clear(b->scan, page);
	return was_dirty;
}

/*
 * The whole host page, nothing in between; before postcopy just what is dirty of it. 0: somebody else has
 * taken it.
 */
static int64_t put_host_page(struct src *s, struct src_tx *tx, uint32_t index, uint64_t page)
{
	struct src_block *b = &s->blocks[index];
	uint64_t unit = b->page_size >> RAM_PAGE_BITS, end;
	bool whole = atomic_load_explicit(&s->postcopy, memory_order_relaxed);
	int64_t sent = 0;
	int ret;

	page &= ~(unit - 1);
	for (end = page + unit; page < end; page++) {
		if (!take_page(b, page) && (!whole || !sent)) {
			if (whole)
				return 0;
			continue;
		}
		ret = put_page(s, tx, index, page);
		if (ret < 0)
			return ret;
		sent++;
	}
	if (whole && b->release && atomic_load(&s->moved))
		src_release_page(s, b, (page - unit) << RAM_PAGE_BITS, b->page_size);
	return sent;
}

static int put_section_head(struct src *s, uint8_t type)
{
	uint8_t head[5] = { type };

	put_be32(head + 1, s->ram_section_id);
	return chan_put_locked(s->ch, head, sizeof(head)) < 0 ? channel_error(s, &s->main) : 0;
}

static int put_flush(struct src *s)
{
	uint8_t word[8];

	put_be64(word, RAM_FLAG_MULTIFD_FLUSH);
	return chan_put_locked(s->ch, word, sizeof(word)) < 0 ? channel_error(s, &s->main) : 0;
}

static int put_section_tail(struct src *s)
{
	uint8_t tail[13];

	put_be64(tail, RAM_FLAG_EOS);
	tail[8] = TYPE_FOOTER;
	put_be32(tail + 9, s->ram_section_id);
	return chan_put_locked(s->ch, tail, sizeof(tail)) < 0 ? channel_error(s, &s->main) : 0;
}

/* The next dirty page from the scan's place on, wrapping round once. */
static bool scan_next(struct src *s, uint32_t *block, uint64_t *page)
{
	for (uint32_t tried = 0; tried <= s->block_count; tried++) {
		const struct src_block *b = &s->blocks[s->scan_block];
		uint64_t pages = b->used_length >> RAM_PAGE_BITS;
		uint64_t found = bitmap_next_set(b->scan, pages, s->scan_page);

		if (found < pages) {
			*block = s->scan_block;
			*page = found;
			return true;
		}
		s->scan_page = 0;
		s->scan_block = (s->scan_block + 1) % s->block_count;
	}
	return false;
}

/* The next page of the list that is still to be pushed. */
static bool prefetch_next(struct src *s, uint32_t *block, uint64_t *page)
{
	while (s->prefetch_at < s->prefetch_count) {
		const struct src_request *r = &s->prefetch[s->prefetch_at++];
		const struct src_block *b = &s->blocks[r->block];

		if (r->first < b->used_length >> RAM_PAGE_BITS && bitmap_test(b->dirty, r->first)) {
			*block = r->block;
			*page = r->first;
			return true;
		}
	}
	return false;
}

static bool has_background(struct src *s)
{
	uint32_t index;
	uint64_t page;

	return s->block_count && (s->prefetch_at < s->prefetch_count || src_has_advice(s) ||
				  scan_next(s, &index, &page));
}

/* Bytes put out so far, wherever. */
static uint64_t put_so_far(const struct src *s)
{
	return s->ch->wpos + (s->multifd ? src_multifd_taken(s) : 0);
}

static int64_t scan_locked(struct src *s, uint64_t max_bytes)
{
	uint64_t until = put_so_far(s) + max_bytes, page;
	uint64_t hint = atomic_exchange(&s->scan_hint, SRC_NO_HINT);
	int64_t sent = 0, n;
	uint32_t index;

	if (hint != SRC_NO_HINT) {
		s->scan_block = (uint32_t)(hint >> 40);
		s->scan_page = hint & ((1ull << 40) - 1);
	}

	while (put_so_far(s) < until && prefetch_next(s, &index, &page)) {
		n = put_host_page(s, &s->main, index, page);
		if (n < 0)
			return n;
		sent += n;
	}
	while (s->postcopy && s->ch->wpos < until && src_next_advised(s, &index, &page)) {
		n = put_host_page(s, &s->main, index, page);
		if (n < 0)
			return n;
		sent += n;
		s->stats.advised_pages += (uint64_t)n;
	}
	while (put_so_far(s) < until && scan_next(s, &index, &page)) {
		n = put_host_page(s, &s->main, index, page);
		if (n < 0)
			return n;
		sent += n;
		s->scan_page = (page | ((s->blocks[index].page_size >> RAM_PAGE_BITS) - 1)) + 1;
	}
	return sent;
}

static int64_t part_locked(struct src *s, uint8_t type, uint64_t max_bytes)
{
	int64_t sent;
	int ret;

	/* Behind the END section no page may follow on this channel. */
	if (s->postcopy && type == TYPE_END) {
		atomic_store(&s->stream_ended, true);
		if (!s->urgent.ch)
			atomic_store(&s->ended, true);
	}

	ret = put_section_head(s, type);
	if (ret < 0)
		return ret;
	sent = s->block_count ? scan_locked(s, max_bytes) : 0;
	if (sent < 0)
		return sent;
	if (s->multifd) {
		bool flush = false;

		ret = src_multifd_end_section(s, type == TYPE_END || !max_bytes, &flush);
		if (!ret && flush)
			ret = put_flush(s);
		if (ret < 0)
			return ret;
	}
	ret = put_section_tail(s);
	if (ret < 0)
		return ret;
	return chan_flush_locked(s->ch) < 0 ? channel_error(s, &s->main) : sent;
}

int64_t src_send_part(struct src *s, uint8_t type, uint64_t max_bytes)
{
	int64_t sent;

	chan_lock(s->ch);
	sent = part_locked(s, type, max_bytes);
	chan_unlock(s->ch);
	return sent;
}

/*
 * The package whole, and what follows it, under one hold of the lock: the first request may come the moment
 * the last byte is out, and its page must not land inside the package.
 */
int src_send_package(struct src *s, const void *stream, uint64_t length, bool run_alone)
{
	int ret = 0;

	chan_lock(s->ch);
	s->package_ns = now_ns();
	atomic_store(&s->postcopy, true);
	s->main.last_block = SRC_NO_BLOCK;	/* the peer's "last block" starts anew too */
	s->scan_block = 0;
	s->scan_page = 0;
	atomic_store(&s->run_wanted, run_alone);
	if (chan_put_locked(s->ch, stream, length) < 0 || chan_flush_locked(s->ch) < 0)
		ret = channel_error(s, &s->main);
	chan_unlock(s->ch);
	return ret;
}

int src_push_request(struct src *s, const struct src_request *r)
{
	uint32_t tail;
	int ret = -EAGAIN;

	pthread_mutex_lock(&s->ring_lock);
	tail = atomic_load_explicit(&s->ring_tail, memory_order_relaxed);
	if (tail - atomic_load_explicit(&s->ring_head, memory_order_acquire) < SRC_RING) {
		s->ring[tail % SRC_RING] = *r;
		atomic_store(&s->ring_tail, tail + 1);
		ret = 0;
	}
	pthread_mutex_unlock(&s->ring_lock);
	return ret;
}

/* What is touched next is likely near: the scan goes on behind the page. */
static void hint_scan(struct src *s, uint32_t index, uint64_t next)
{
	if (next >= s->blocks[index].used_length >> RAM_PAGE_BITS)
		next = 0;
	atomic_store(&s->scan_hint, (uint64_t)index << 40 | next);
}

/* Answer one request; on the main channel in a section of its own. Target pages sent. */
static int64_t serve_one(struct src *s, struct src_tx *tx, const struct src_request *r)
{
	const struct src_block *b = &s->blocks[r->block];
	uint64_t unit = b->page_size >> RAM_PAGE_BITS;
	bool in_section = tx == &s->main;
	int64_t sent = 0;

	for (uint64_t page = r->first & ~(unit - 1); page < r->first + r->count; page += unit) {
		int64_t n;

		if (atomic_load(&s->ended) || !bitmap_test(b->dirty, page)) {
			if (atomic_load(&s->ended) || !src_ask_upstream(s, r->block, page))
				count(&s->stats.duplicate_requests, 1);
			continue;
		}
		n = in_section && !sent ? put_section_head(s, TYPE_PART) : 0;
		if (n < 0)
			return n;
		n = put_host_page(s, tx, r->block, page);
		if (n < 0)
			return n;
		sent += n;
		hint_scan(s, r->block, page + unit);
	}
	if (in_section && sent) {
		int ret = put_section_tail(s);

		if (ret < 0)
			return ret;
	}
	count(&s->stats.requested_pages, (uint64_t)sent);
	return sent;
}

static int put_run(struct src *s)
{
	static const uint8_t run[5] = { TYPE_COMMAND, 0, CMD_RUN, 0, 0 };

	/* From the first byte of this command on the guest belongs to the destination. */
	atomic_store(&s->run_sent, true);
	atomic_store(&s->moved, true);
	__atomic_store_n(&s->stats.run_sent_ns, now_ns(), __ATOMIC_RELAXED);
	return chan_put_locked(s->ch, run, sizeof(run)) < 0 ? channel_error(s, &s->main) : 0;
}

/* Under tx's wlock: everything in the ring, each answer sent at once. */
static int serve_ring(struct src *s, struct src_tx *tx)
{
	for (;;) {
		uint32_t head = atomic_load_explicit(&s->ring_head, memory_order_relaxed);
		int64_t n;

		if (head == atomic_load(&s->ring_tail))
			return 0;
		n = serve_one(s, tx, &s->ring[head % SRC_RING]);
		atomic_store_explicit(&s->ring_head, head + 1, memory_order_release);
		if (n < 0)
			return (int)n;
		if (n > 0 && chan_flush_locked(tx->ch) < 0)
			return channel_error(s, tx);
	}
}

int src_serve_locked(struct src *s)
{
	if (atomic_exchange(&s->run_due, false)) {
		int ret = put_run(s);

		if (ret < 0)
			return ret;
		if (chan_flush_locked(s->ch) < 0)
			return channel_error(s, &s->main);
	}
	return s->urgent.ch ? 0 : serve_ring(s, &s->main);
}

int src_serve_urgent(struct src *s)
{
	int ret;

	chan_lock(s->urgent.ch);
	ret = serve_ring(s, &s->urgent);
	chan_unlock(s->urgent.ch);
	/* A destination that has all it needs may close this channel before it says so. */
	return ret < 0 && atomic_load(&s->stream_ended) ? 0 : ret;
}

int src_end_urgent(struct src *s, bool with_eos)
{
	uint8_t eos[8];
	int ret = 0;

	if (!s->urgent.ch || !with_eos)
		return 0;
	chan_lock(s->urgent.ch);
	atomic_store(&s->ended, true);
	put_be64(eos, RAM_FLAG_EOS);
	ret = chan_put_locked(s->urgent.ch, eos, sizeof(eos));
	if (!ret)
		ret = chan_flush_locked(s->urgent.ch);
	chan_unlock(s->urgent.ch);
	return ret;
}

static bool has_urgent(struct src *s)
{
	bool asked = !s->urgent.ch && atomic_load(&s->ring_head) != atomic_load(&s->ring_tail);

	/* RUN may have gone out from the return-path thread, its kick already read: that is to be told too. */
	return asked || atomic_load(&s->run_due) || (!s->run_told && atomic_load(&s->run_sent));
}

/* -ECANCELED when told to stop; a request or a changed setting ends the wait early. */
static int wait_kick(struct src *s, int timeout_ms)
{
	struct pollfd p[2] = { { .fd = s->kick_fd, .events = POLLIN }, { .fd = s->stop_fd, .events = POLLIN } };
	uint64_t drained;
	ssize_t ignored;

	if (poll(p, 2, timeout_ms) < 0 && errno != EINTR)
		return -errno;
	if (p[1].revents)
		return -ECANCELED;
	ignored = read(s->kick_fd, &drained, sizeof(drained));
	(void)ignored;
	return 0;
}

struct budget {
	uint64_t rate, since_ns, start;
};

/* Milliseconds to wait before the scan may send more; 0 = now. Requested pages never ask. */
static int over_budget(struct src *s, struct budget *b)
{
	uint64_t rate = atomic_load_explicit(&s->bytes_per_second, memory_order_relaxed);
	uint64_t elapsed, allowed, sent;

	if (!rate) {
		b->rate = 0;
		return 0;
	}
	if (rate != b->rate) {
		b->rate = rate;
		b->since_ns = now_ns();
		b->start = s->ch->wpos;
	}
	elapsed = now_ns() - b->since_ns;
	sent = s->ch->wpos - b->start;
	allowed = (uint64_t)((__uint128_t)elapsed * rate / 1000000000u);
	if (sent <= allowed)
		return 0;
	return (int)((sent - allowed) * 1000 / rate) + 1;
}

/* One round under the lock. *wait_ms: how long to sleep after it; *done: nothing is left to send. */
static int postcopy_round(struct src *s, struct budget *budget, int *wait_ms, bool *done)
{
	bool hold = atomic_load(&s->hold_background);
	int ret = src_serve_locked(s);
	int64_t sent;

	if (ret < 0)
		return ret;
	*wait_ms = hold ? -1 : over_budget(s, budget);
	if (*wait_ms)
		return 0;
	if (has_background(s)) {
		sent = part_locked(s, TYPE_PART, SRC_BATCH_BYTES);
		return sent < 0 ? (int)sent : 0;
	}
	if (atomic_load(&s->more_coming) || src_is_loading(s) ||
	    (atomic_load(&s->run_wanted) && !atomic_load(&s->run_sent)))
		*wait_ms = -1;
	else
		*done = true;
	return 0;
}

/* The return-path thread may be reporting why at this very moment. */
static int stopped(struct src *s, int ret)
{
	chan_lock(s->ch);
	ret = mig_fail(&s->error, -ret, s->ch->wpos, "ram", "stopped");
	chan_unlock(s->ch);
	return ret;
}

int src_postcopy_loop(struct src *s)
{
	struct budget budget = { 0 };
	bool done = false;

	while (!done) {
		int wait_ms = 0, ret;
		bool releasing;

		if (!s->run_told && atomic_load(&s->run_sent)) {
			s->run_told = true;
			return SRC_RUN_SENT;
		}

		releasing = src_release_some(s);
		chan_lock(s->ch);
		ret = postcopy_round(s, &budget, &wait_ms, &done);
		chan_unlock(s->ch);
		if (ret < 0)
			return ret;
		if (done || !wait_ms || releasing)
			continue;
		if (has_urgent(s))
			continue;
		ret = wait_kick(s, wait_ms);
		if (ret < 0)
			return stopped(s, ret);
	}
	while (src_release_some(s))
		;	/* RUN may have been the very last thing that went out */
	return SRC_ALL_SENT;
}
