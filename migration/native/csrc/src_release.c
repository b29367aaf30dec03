/* Capability release-ram: what the destination has need not be kept. There is no recovery after that. */
#define _GNU_SOURCE
#include "src.h"

#include "bitmap.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

int src_set_release(struct src *s, uint32_t index, int fd)
{
	if (index >= s->block_count)
		return -EINVAL;
	s->blocks[index].fd = fd;
	s->blocks[index].release = 1;
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

int64_t src_release_clean(struct src *s)
{
	for (uint32_t i = 0; i < s->block_count; i++) {
		struct src_block *b = &s->blocks[i];
		uint64_t pages = b->used_length >> RAM_PAGE_BITS, at = 0;

		while (b->release && (at = bitmap_next_clear(b->dirty, pages, at)) < pages) {
			uint64_t end = bitmap_next_set(b->dirty, pages, at);

			src_release_page(s, b, at << RAM_PAGE_BITS, (end - at) << RAM_PAGE_BITS);
			at = end;
		}
	}
	return (int64_t)s->stats.released_pages;
}
