/* The fault thread: every page that is missed is asked for once. */
#include "dst.h"

#include "be.h"
#include "bitmap.h"
#include "uffd.h"
#include "uffd_abi.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

#define BATCH 64
#define REQUEST_MAX (4 + 13 + 255)

/* Under the channel's wlock: the short form depends on what went out last. */
int dst_put_request(struct dst *d, struct chan *ch, uint32_t index, uint64_t offset, uint32_t length)
{
	const struct dst_block *b = &d->blocks[index];
	bool named = d->last_requested_block != index;
	uint8_t msg[REQUEST_MAX];
	size_t n = 4 + 12;

	put_be16(msg, named ? 3 : 4);
	put_be64(msg + 4, offset);
	put_be32(msg + 12, length);
	if (named) {
		msg[n++] = b->id_len;
		memcpy(msg + n, b->idstr, b->id_len);
		n += b->id_len;
		d->last_requested_block = index;
	}
	put_be16(msg + 2, (uint16_t)(n - 4));
	return chan_put_locked(ch, msg, n);
}

/* A page that is here already: its sleeper only has to be woken, or given the zeros it came as. */
static int resolve_here(struct dst *d, struct dst_block *b, uint64_t offset, bool is_minor)
{
	uint64_t address = (uintptr_t)b->host + offset;
	int64_t ret;

	dst_count(&d->stats.resolved_locally, 1);
	if (!is_minor) {
		ret = dst_place_zero_local(d, b, offset);
		return ret == -ENOSPC ? mig_fail(&d->fault_error, ENOSPC, 0, "fault", "block %s offset %#llx: "
						 DST_NO_HUGE_PAGE, b->idstr, (unsigned long long)offset,
						 (unsigned long long)b->page_size >> 10) : (int)ret;
	}
	ret = uffd_continue(d->uffd, address, b->page_size, 0);
	if (ret == -EEXIST)
		return uffd_wake(d->uffd, address, b->page_size);
	return ret < 0 ? (int)ret : 0;
}

/* 1: a request was put into ch's buffer (its wlock is held from the first one on). */
static int one_fault(struct dst *d, struct chan *ch, const struct uffd_msg *m, bool *locked)
{
	bool is_minor = m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR;
	uint64_t offset, first;
	struct dst_block *b;
	uint32_t index;
	bool asked;
	int ret;

	dst_count(&d->stats.faults, 1);
	dst_count(&d->stats.minor_faults, is_minor);
	ret = dst_find_address(d, m->arg.pagefault.address, &index, &offset);
	if (ret < 0)
		return mig_fail(&d->fault_error, EFAULT, 0, "fault", "a fault at %#llx, outside every RAM block",
				(unsigned long long)m->arg.pagefault.address);
	b = &d->blocks[index];
	offset &= ~(b->page_size - 1);
	first = offset >> RAM_PAGE_BITS;
	if (bitmap_test(b->received, first)) {
		ret = resolve_here(d, b, offset, is_minor);
		return ret < 0 ? mig_fail(&d->fault_error, -ret, 0, "fault", "block %s offset %#llx: %s", b->idstr,
					  (unsigned long long)offset, strerror(-ret)) : 0;
	}
	pending_add(d->pending, (uintptr_t)b->host + offset, m->arg.pagefault.feat.ptid);
	dst_track_add(d, (uintptr_t)b->host + offset, (int32_t)m->arg.pagefault.feat.ptid);
	asked = bitmap_test_and_set(b->requested, first);
	/* The bit first: who places the page after this line sees it, who did before is seen here. */
	if (bitmap_test(b->received, first)) {
		/* It came while this was written down: nobody else would end the waiting. */
		dst_track_forget(d, (uintptr_t)b->host + offset);
		return 0;
	}
	if (asked) {
		dst_count(&d->stats.duplicate_faults, 1);
		return 0;
	}
	dst_count(&d->stats.requests, 1);
	if (!atomic_load_explicit(&d->running, memory_order_relaxed) && d->main_tid &&
	    (int32_t)m->arg.pagefault.feat.ptid == d->main_tid)
		dst_count(&d->stats.requests_by_main, 1);
	if (atomic_load(&d->rp_broken))
		return 0;
	if (!*locked) {
		chan_lock(ch);
		*locked = true;
	}
	return dst_put_request(d, ch, index, offset, (uint32_t)b->page_size) < 0 ? 0 : 1;
}

static int serve_batch(struct dst *d)
{
	struct uffd_msg msgs[BATCH];
	struct chan *ch = atomic_load(&d->ch);
	bool locked = false;
	int64_t n = uffd_read(d->uffd, msgs, BATCH);
	int ret = 0;

	if (n < 0)
		return mig_fail(&d->fault_error, (int)-n, 0, "fault", "reading the userfaultfd: %s",
				strerror((int)-n));
	for (int64_t i = 0; i < n && ret >= 0; i++)
		if (msgs[i].event == UFFD_EVENT_PAGEFAULT)
			ret = one_fault(d, ch, &msgs[i], &locked);
	if (locked) {
		/* A broken return path is the listen thread's to report; the faults stay noted. A channel that
		 * was replaced meanwhile has nothing to say about the new one. */
		if (chan_flush_locked(ch) < 0 && ch == atomic_load(&d->ch))
			atomic_store(&d->rp_broken, true);
		chan_unlock(ch);
	}
	return ret < 0 ? ret : 0;
}

int dst_fault_loop(struct dst *d)
{
	struct pollfd p[2] = {
		{ .fd = d->uffd, .events = POLLIN },
		{ .fd = atomic_load(&d->stop_fd), .events = POLLIN },
	};

	sem_post(&d->loops_begun);
	for (;;) {
		if (poll(p, 2, -1) < 0) {
			if (errno == EINTR)
				continue;
			return mig_fail(&d->fault_error, errno, 0, "fault", "poll: %s", strerror(errno));
		}
		if (p[1].revents)
			return 0;
		if (p[0].revents & (POLLERR | POLLNVAL))
			return mig_fail(&d->fault_error, EIO, 0, "fault",
					"the userfaultfd answers POLLERR: is it blocking?");
		if (p[0].revents) {
			int ret = serve_batch(d);

			if (ret < 0)
				return ret;
		}
	}
}

static int request_block_again(struct dst *d, struct chan *ch, uint32_t index, int64_t *count)
{
	struct dst_block *b = &d->blocks[index];
	uint64_t pages = b->used_length >> RAM_PAGE_BITS, unit = b->page_size >> RAM_PAGE_BITS, at = 0;

	while ((at = bitmap_next_set(b->requested, pages, at)) < pages) {
		if (!bitmap_test(b->received, at)) {
			int ret = dst_put_request(d, ch, index, at << RAM_PAGE_BITS, (uint32_t)b->page_size);

			if (ret < 0)
				return ret;
			(*count)++;
		}
		at += unit;
	}
	return 0;
}

int64_t dst_request_again(struct dst *d)
{
	struct chan *ch = atomic_load(&d->ch);
	int64_t count = 0;
	int ret = 0;

	chan_lock(ch);
	d->last_requested_block = DST_NO_BLOCK;
	/* Before the bitmaps are read: a fault noted from here on is asked for by its own thread. */
	atomic_store(&d->rp_broken, false);
	for (uint32_t i = 0; i < d->block_count && ret >= 0; i++)
		ret = request_block_again(d, ch, i, &count);
	if (ret >= 0)
		ret = chan_flush_locked(ch);
	chan_unlock(ch);
	return ret < 0 ? ret : count;
}
