/* SPDX-License-Identifier: MIT */
/*
 * Turn ranges of small pages that are all present into huge pages, one huge page a system call, so that
 * whoever touches the memory meanwhile waits for one at most. Slow (the kernel copies everything once) and
 * therefore made for a thread of its own, without an interpreter lock.
 */
#ifndef GUESTMEM_COLLAPSE_H
#define GUESTMEM_COLLAPSE_H

#include <stdint.h>

struct collapse_stats {
	uint64_t tried;
	uint64_t done;
	uint64_t busy;		/* the kernel could not just now: pages in use, being moved, or missing */
	uint64_t no_memory;	/* no free huge page */
	uint64_t refused;	/* anything else */
	int32_t last_error;	/* errno of the last that was not done */
};

struct collapse {
	uint32_t stop;		/* set by any thread: ends after the page at hand */
	struct collapse_stats stats;	/* written by the collapsing thread, word by word */
};

/*
 * Every whole huge page of [start, start + length). 0; -ECANCELED: stopped; -EINVAL: the first one was refused
 * so, that is, this kernel (before 6.1) or this memory has no such operation.
 */
int collapse_range(struct collapse *c, uint64_t start, uint64_t length, uint64_t huge);
void collapse_stop(struct collapse *c);
void collapse_get(const struct collapse *c, struct collapse_stats *out);

#endif
