/*
 * Capability release-ram: what the destination has need not be kept. There is no recovery after that.
 *
 * Not before the guest is the destination's for good: until then it may have to run here again, with all of its
 * RAM. What was sent by then is dropped by a sweep afterwards, some pages between two batches, since requests
 * wait meanwhile.
 */
#define _GNU_SOURCE
#include "src.h"

#include "bitmap.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#define RELEASE_PAGES 512	/* target pages a step */

int src_set_release(struct src *s, uint32_t index, int fd)
{
	if (index >= s->block_count)
		return -EINVAL;
	s->blocks[index].fd = fd;
	s->blocks[index].release = 1;
	s->releases = true;
	return 0;
}

/* Best effort: a page that stays costs memory, nothing else. */
void src_release_page(struct src *s, struct src_block *b, uint64_t offset, uint64_t length)
{
	int ret = b->fd >= 0 ?
		fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) :
		madvise((void *)(uintptr_t)(b->host + offset), length, MADV_DONTNEED);

	if (!ret)
		__atomic_fetch_add(&s->stats.released_pages, length >> RAM_PAGE_BITS, __ATOMIC_RELAXED);
}

/* One step of the sweep; under both channels' wlocks, so that no page is between its dirty bit and the wire. */
static void release_step(struct src *s)
{
	struct src_block *b = &s->blocks[s->release_block];
	uint64_t pages = b->used_length >> RAM_PAGE_BITS, unit = b->page_size >> RAM_PAGE_BITS;
	uint64_t at = b->release ? bitmap_next_clear(b->dirty, pages, s->release_page) : pages, end, most;

	if (at >= pages) {
		s->release_block++;
		s->release_page = 0;
		return;
	}
	end = bitmap_next_set(b->dirty, pages, at);
	most = at + (unit > RELEASE_PAGES ? unit : RELEASE_PAGES);
	if (end > most)
		end = most;
	src_release_page(s, b, at << RAM_PAGE_BITS, (end - at) << RAM_PAGE_BITS);
	s->release_page = end;
}

bool src_release_some(struct src *s)
{
	if (!s->releases || !atomic_load(&s->moved) || s->release_block == s->block_count)
		return false;
	chan_lock(s->ch);
	if (s->urgent.ch)
		chan_lock(s->urgent.ch);
	release_step(s);
	if (s->urgent.ch)
		chan_unlock(s->urgent.ch);
	chan_unlock(s->ch);
	return s->release_block < s->block_count;
}
