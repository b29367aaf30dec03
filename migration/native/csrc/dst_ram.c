/* RAM records on the destination: stored before LISTEN, placed as whole host pages after it. */
#define _GNU_SOURCE
#include "dst.h"

#include "be.h"
#include "bitmap.h"
#include "src.h"
#include "uffd.h"

#include <errno.h>
#include <linux/falloc.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static int bad(struct dst_rx *rx, int code, const char *what, uint64_t value)
{
	const char *name = rx->last_block == DST_NO_BLOCK ? "-" : rx->d->blocks[rx->last_block].idstr;

	return mig_fail(&rx->error, code, rx->ch->rpos, "ram", "%s (block %s, %#llx)", what, name,
			(unsigned long long)value);
}

/* Turn a channel's answer into this side's error: a cut stream is told apart from bad bytes. */
static int stream_error(struct dst_rx *rx, int ret)
{
	if (rx->ch->rerror.code) {
		rx->error = rx->ch->rerror;
		return ret;
	}
	if (ret == -ECANCELED)
		return mig_fail(&rx->error, ECANCELED, rx->ch->rpos, "ram", "stopped");
	if (ret == -ENODATA)
		return mig_fail(&rx->error, EPIPE, rx->ch->rpos, "ram",
				"the stream ends inside a section");
	return mig_fail(&rx->error, -ret, rx->ch->rpos, "ram", "reading the channel: %s", strerror(-ret));
}

/* The block after the last one is the likely one: with many blocks the first look must find it. */
int dst_find_block(const struct dst_rx *rx, const char *id, uint32_t len)
{
	uint32_t count = rx->d->block_count, i = rx->last_block < count ? rx->last_block : 0;

	for (uint32_t tried = 0; tried < count; tried++, i++) {
		const struct dst_block *b = &rx->d->blocks[i < count ? i : (i = 0)];

		if (b->id_len == len && !memcmp(b->idstr, id, len))
			return (int)i;
	}
	return -ENOENT;
}

/* COPY on a dry pool of huge pages says EEXIST too: residency tells the two apart. */
bool dst_pool_is_dry(const struct dst_block *b, uint64_t offset)
{
	unsigned char in_core[1];

	/* mincore answers a byte for each base page: one is enough. */
	return b->is_hugetlb && !mincore(b->host + offset, RAM_PAGE_BYTES, in_core) && !(in_core[0] & 1);
}

/* The kernel took no page: say why, in the words of who can mend it. */
static int place_error(struct dst_rx *rx, const struct dst_block *b, uint64_t offset, int64_t ret)
{
	if (ret == -EEXIST && dst_pool_is_dry(b, offset))
		return mig_fail(&rx->error, ENOSPC, rx->ch->rpos, "ram",
				"block %s offset %#llx: " DST_NO_HUGE_PAGE, b->idstr,
				(unsigned long long)offset, (unsigned long long)b->page_size >> 10);
	if (ret == -EEXIST)
		return mig_fail(&rx->error, EEXIST, rx->ch->rpos, "ram",
				"block %s offset %#llx: the page is already there", b->idstr,
				(unsigned long long)offset);
	return mig_fail(&rx->error, (int)-ret, rx->ch->rpos, "ram",
			"block %s offset %#llx: placing the page: %s", b->idstr,
			(unsigned long long)offset, strerror((int)-ret));
}

/*
 * The page cache already has a page nobody sent (made by another mapping of the file): put the sent bytes
 * into it and map it. Only for base pages: hugetlbfs takes no write(2).
 */
static int64_t place_into_page_cache(struct dst_rx *rx, const struct dst_block *b, uint64_t offset,
				     const uint8_t *data, uint64_t length)
{
	if (!b->is_shared || b->is_hugetlb || b->fd < 0)
		return -EEXIST;
	if (pwrite(b->fd, data, length, (off_t)offset) != (ssize_t)length)
		return -EEXIST;
	return uffd_continue(rx->d->uffd, (uintptr_t)b->host + offset, length, 0);
}

static int place_data(struct dst_rx *rx, const struct dst_block *b, uint64_t offset, const uint8_t *data,
		      uint64_t length)
{
	uint64_t done = 0;

	while (done < length) {
		int64_t ret = uffd_copy(rx->d->uffd, (uintptr_t)b->host + offset + done,
					(uintptr_t)data + done, length - done, 0);

		if (ret == -EEXIST)
			ret = place_into_page_cache(rx, b, offset + done, data + done, length - done);
		if (ret > 0)
			done += (uint64_t)ret;
		else if (ret == -EAGAIN)
			sched_yield();	/* the mapping changes this moment; no event is ours to read */
		else
			return place_error(rx, b, offset + done, ret);
	}
	return 0;
}

static int place_zeros(struct dst_rx *rx, const struct dst_block *b, uint64_t offset, uint64_t length)
{
	static const uint8_t zeros[RAM_PAGE_BYTES];
	uint64_t done = 0;

	if (b->is_hugetlb) {
		for (; done < length; done += b->page_size) {
			int ret = place_data(rx, b, offset + done, rx->d->zero_page, b->page_size);

			if (ret < 0)
				return ret;
		}
		return 0;
	}
	while (done < length) {
		int64_t ret = uffd_zeropage(rx->d->uffd, (uintptr_t)b->host + offset + done, length - done, 0);

		if (ret == -EEXIST)
			ret = place_into_page_cache(rx, b, offset + done, zeros, RAM_PAGE_BYTES);
		if (ret > 0)
			done += (uint64_t)ret;
		else if (ret == -EAGAIN)
			sched_yield();
		else
			return place_error(rx, b, offset + done, ret);
	}
	return 0;
}

/* A page that came as zero before LISTEN was never populated: its zeros are put in when it is touched. */
int dst_place_zero_local(struct dst *d, const struct dst_block *b, uint64_t offset)
{
	uint64_t address = (uintptr_t)b->host + offset;
	int64_t ret;

	do {
		ret = b->is_hugetlb ?
			uffd_copy(d->uffd, address, (uintptr_t)d->zero_page, b->page_size, 0) :
			uffd_zeropage(d->uffd, address, b->page_size, 0);
	} while (ret == -EAGAIN);
	/* Woken on a dry pool its sleeper would only fault again, for ever. */
	if (ret == -EEXIST && dst_pool_is_dry(b, offset))
		return -ENOSPC;
	if (ret == -EEXIST)
		return uffd_wake(d->uffd, address, b->page_size);
	return ret < 0 ? (int)ret : 0;
}

/* The bits go up after the pages are in: the fault thread takes a set bit for a page that is here. */
static void mark_received(struct dst_rx *rx, struct dst_block *b, uint64_t offset, uint64_t length)
{
	bitmap_set_atomic(b->received, offset >> RAM_PAGE_BITS, length >> RAM_PAGE_BITS);
	dst_count(&rx->stats.host_pages_placed, length / b->page_size);
	for (uint64_t end = offset + length; offset < end; offset += b->page_size)
		if (bitmap_test(b->requested, offset >> RAM_PAGE_BITS))
			dst_track_done(rx, dst_page_key(rx->d, (uint32_t)(b - rx->d->blocks), offset));
}

static void tell_arrival(struct dst *d)
{
	int fd = atomic_load_explicit(&d->arrival_fd, memory_order_relaxed);
	uint64_t one = 1;
	ssize_t ignored;

	if (fd < 0)
		return;
	ignored = write(fd, &one, sizeof(one));
	(void)ignored;
}

int dst_flush_run(struct dst_rx *rx)
{
	uint64_t length = rx->run_length;
	struct dst_block *b;
	int ret;

	if (!length)
		return 0;
	b = &rx->d->blocks[rx->run_block];
	rx->run_length = 0;
	if (rx->d->sink)
		ret = dst_store_run(rx, b, rx->run_offset, rx->run_is_zero ? NULL : rx->run_data, length);
	else
		ret = rx->run_is_zero ? place_zeros(rx, b, rx->run_offset, length) :
				       place_data(rx, b, rx->run_offset, rx->run_data, length);
	if (ret < 0)
		return ret;
	mark_received(rx, b, rx->run_offset, length);
	tell_arrival(rx->d);
	if (rx->d->relay_to)
		return src_pages_came(rx->d->relay_to, rx->run_block, rx->run_offset, length,
				      rx->run_is_zero);
	return 0;
}

/*
 * Neighbouring pages are placed by one call: a COPY of 64 KiB costs a quarter less per page than sixteen,
 * which pays for the memcpy. Nobody waits for it: a run ends with its section, and before any wait.
 */
static int add_to_run(struct dst_rx *rx, uint32_t index, uint64_t offset, const uint8_t *data)
{
	bool goes_on = rx->run_length && rx->run_block == index && rx->run_is_zero == !data &&
		       rx->run_offset + rx->run_length == offset &&
		       (!data || rx->run_length < DST_RUN_BYTES);
	int ret;

	if (!goes_on) {
		ret = dst_flush_run(rx);
		if (ret < 0)
			return ret;
		rx->run_block = index;
		rx->run_offset = offset;
		rx->run_is_zero = !data;
	}
	if (data)
		memcpy(rx->run_data + rx->run_length, data, RAM_PAGE_BYTES);
	rx->run_length += RAM_PAGE_BYTES;
	return 0;
}

/* Collect the target pages of one host page; place it when the last one is in. */
static int assemble(struct dst_rx *rx, uint32_t index, uint64_t offset, const uint8_t *data)
{
	struct dst_block *b = &rx->d->blocks[index];
	uint64_t page = offset & ~(b->page_size - 1), at = offset - page;
	uint64_t pages = b->page_size >> RAM_PAGE_BITS;
	int ret;

	if (rx->hp_block == DST_NO_BLOCK) {
		rx->hp_block = index;
		rx->hp_offset = page;
		rx->hp_count = 0;
		rx->hp_all_zero = true;
		bitmap_clear(rx->hp_have, 0, pages);
	}
	if (rx->hp_block != index || rx->hp_offset != page)
		return bad(rx, EPROTO, "a page of another host page before this one was whole", offset);
	if (bitmap_test(rx->hp_have, at >> RAM_PAGE_BITS))
		return bad(rx, EPROTO, "a target page came twice within its host page", offset);
	bitmap_set(rx->hp_have, at >> RAM_PAGE_BITS, 1);
	if (data) {
		memcpy(rx->hp_data + at, data, RAM_PAGE_BYTES);
		rx->hp_all_zero = false;
	} else {
		memset(rx->hp_data + at, 0, RAM_PAGE_BYTES);
	}
	if (++rx->hp_count < pages)
		return 0;
	rx->hp_block = DST_NO_BLOCK;
	ret = rx->hp_all_zero ? place_zeros(rx, b, page, b->page_size) :
			       place_data(rx, b, page, rx->hp_data, b->page_size);
	if (ret < 0)
		return ret;
	mark_received(rx, b, page, b->page_size);
	return 0;
}

static int place(struct dst_rx *rx, uint32_t index, uint64_t offset, const uint8_t *data)
{
	struct dst_block *b = &rx->d->blocks[index];

	/* Also when it only waits in the run: placing it twice could undo what the guest wrote in between. */
	if (bitmap_test(b->received, offset >> RAM_PAGE_BITS) ||
	    (rx->run_length && rx->run_block == index && offset - rx->run_offset < rx->run_length))
		return bad(rx, EPROTO, "a page came that is already here", offset);
	if (data)
		dst_count(&rx->stats.pages_normal, 1);
	else
		dst_count(&rx->stats.pages_zero, 1);
	if (b->page_size > RAM_PAGE_BYTES && !rx->d->sink)
		return assemble(rx, index, offset, data);
	return add_to_run(rx, index, offset, data);
}

/*
 * Before LISTEN nothing is registered and pages may come again. A zero page that was never written stays
 * unpopulated: the block was emptied before the first byte of the stream.
 */
static int store(struct dst_rx *rx, uint32_t index, uint64_t offset, const uint8_t *data)
{
	struct dst_block *b = &rx->d->blocks[index];
	int ret;

	if (data)
		dst_count(&rx->stats.pages_normal, 1);
	else
		dst_count(&rx->stats.pages_zero, 1);
	dst_count(&rx->stats.precopy_pages, 1);
	if (rx->d->sink)
		return add_to_run(rx, index, offset, data);
	ret = dst_store_run(rx, b, offset, data, RAM_PAGE_BYTES);
	bitmap_set_atomic(b->received, offset >> RAM_PAGE_BITS, 1);
	return ret;
}

/* The whole head in the window. */
static int next_record(struct dst_rx *rx, struct ramrec *r)
{
	size_t want = 8;

	for (;;) {
		int ret;

		if (rx->ch->win_len < want) {
			/* About to wait: whoever sleeps on the pages collected so far goes first. */
			ret = dst_flush_run(rx);
			if (ret < 0)
				return ret;
		}
		ret = chan_need(rx->ch, want);
		if (ret < 0) {
			rx->ended_cleanly = ret == -ENODATA && !rx->ch->win_len && rx->hp_block == DST_NO_BLOCK;
			return stream_error(rx, ret);
		}
		ret = ramrec_decode(rx->ch->win, rx->ch->win_len, r);
		if (ret > 0)
			return 0;
		if (ret < 0)
			return bad(rx, EBADMSG, "no legal RAM record starts here",
				   get_be64(rx->ch->win));
		want = rx->ch->win_len + 1;
	}
}

static int record_block(struct dst_rx *rx, const struct ramrec *r)
{
	int index;

	if (r->has_id) {
		index = dst_find_block(rx, (const char *)rx->ch->win + r->id_at, r->id_len);
		if (index < 0)
			return mig_fail(&rx->error, EBADMSG, rx->ch->rpos, "ram", "unknown RAM block '%.*s'",
					(int)r->id_len, rx->ch->win + r->id_at);
		rx->last_block = (uint32_t)index;
	} else if (rx->last_block == DST_NO_BLOCK) {
		return bad(rx, EBADMSG, "a record continues a block, but none was named", r->offset);
	}
	if (r->offset >= rx->d->blocks[rx->last_block].used_length)
		return bad(rx, EBADMSG, "a page beyond the end of its block", r->offset);
	return 0;
}

static int one_page(struct dst_rx *rx, const struct ramrec *r, bool placing)
{
	const uint8_t *data = NULL;
	int ret;

	if (r->kind == RAM_FLAG_ZERO && r->fill)
		return bad(rx, EBADMSG, "a zero record with another fill byte", r->fill);
	ret = record_block(rx, r);
	if (ret < 0)
		return ret;
	if (r->kind == RAM_FLAG_PAGE) {
		if (rx->ch->win_len < r->head_len + RAM_PAGE_BYTES && placing) {
			ret = dst_flush_run(rx);
			if (ret < 0)
				return ret;
		}
		ret = chan_need(rx->ch, r->head_len + RAM_PAGE_BYTES);
		if (ret < 0)
			return stream_error(rx, ret);
		data = rx->ch->win + r->head_len;
	}
	ret = placing ? place(rx, rx->last_block, r->offset, data) : store(rx, rx->last_block, r->offset, data);
	chan_skip(rx->ch, r->head_len + (data ? RAM_PAGE_BYTES : 0));
	return ret;
}

static int one_xbzrle(struct dst_rx *rx, const struct ramrec *r)
{
	struct dst_block *b;
	int ret = record_block(rx, r);

	if (ret < 0)
		return ret;
	if (r->fill != 1 || r->payload_len > RAM_PAGE_BYTES)
		return bad(rx, EBADMSG, "an XBZRLE record of another encoding or too long", r->payload_len);
	ret = dst_flush_run(rx);
	if (ret < 0)
		return ret;
	ret = chan_need(rx->ch, r->head_len + r->payload_len);
	if (ret < 0)
		return stream_error(rx, ret);
	b = &rx->d->blocks[rx->last_block];
	ret = dst_load_xbzrle(rx, b, r->offset, rx->ch->win + r->head_len, r->payload_len);
	chan_skip(rx->ch, r->head_len + r->payload_len);
	dst_count(&rx->stats.precopy_pages, 1);
	dst_count(&rx->stats.pages_normal, 1);
	return ret;
}

int dst_records(struct dst_rx *rx, bool placing)
{
	for (;;) {
		struct ramrec r;
		int ret = next_record(rx, &r);

		if (ret < 0)
			return ret;
		switch (r.kind) {
		case RAM_FLAG_EOS:
			chan_skip(rx->ch, r.head_len);
			ret = dst_flush_run(rx);
			return ret || placing ? ret : dst_multifd_at_eos(rx->d);
		case RAM_FLAG_PAGE:
		case RAM_FLAG_ZERO:
			ret = one_page(rx, &r, placing);
			if (ret < 0)
				return ret;
			break;
		case RAM_FLAG_XBZRLE:
			if (placing)
				return bad(rx, EBADMSG, "an XBZRLE record in postcopy", r.offset);
			ret = one_xbzrle(rx, &r);
			if (ret < 0)
				return ret;
			break;
		case RAM_FLAG_MULTIFD_FLUSH:
			chan_skip(rx->ch, r.head_len);
			ret = placing ? 0 : dst_multifd_at_flush(rx->d);
			if (ret < 0)
				return ret;
			break;
		default:
			return bad(rx, EBADMSG, placing ?
				   "a record kind that postcopy does not allow" :
				   "a record kind whose capability is off here", r.kind);
		}
	}
}

int dst_load_ram(struct dst *d)
{
	return dst_records(&d->main, false);
}
