/* SPDX-License-Identifier: MIT */
/*
 * Dirty tracking by synchronous write protection: each first write to a protected page is a message,
 * which a thread of ours answers by recording the page and taking the protection off.
 *
 * One lock joins what must not come apart. The handler sets the bit and unprotects under it, the
 * collector takes bits and protects again under it. Were they not joined, a page could be taken and
 * protected between the handler's two steps; the late unprotection would then let a writer pass unseen.
 *
 * No interpreter is needed between a fault and its wake, so a thread that writes while it holds an
 * interpreter lock is served as well. Before the loop ends it unregisters everything and wakes
 * everybody: nobody is left asleep on a protection that nobody takes off.
 */
#ifndef GUESTMEM_WPSYNC_H
#define GUESTMEM_WPSYNC_H

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>

/* One mapping. The mappings of a block (aliases) follow each other and share its bitmap. */
struct wpsync_range {
	uint64_t start;
	uint64_t length;	/* whole host pages */
	uint64_t page_size;	/* of the host */
	uint64_t *written;	/* bit per target page; only touched under the lock */
	uint64_t nbits;
	bool populate;		/* holes are read first: this kernel protects none in such memory */
};

struct wpsync {
	int32_t uffd;		/* nonblocking; the caller's */
	int32_t stop_fd;	/* the caller's */
	struct wpsync_range *ranges;	/* the caller's */
	uint32_t count;
	uint32_t page_bits;	/* of the target page */
	int32_t failed;		/* -errno: the loop ended early and writes were missed since */
	uint64_t faults;	/* first writes seen */
	uint32_t waiting;	/* the handler wants the lock; atomic */
	pthread_mutex_t lock;
	sem_t begun;
};

/* 0 or -errno. */
int wpsync_init(struct wpsync *w, int uffd, int stop_fd, struct wpsync_range *ranges, uint32_t count,
		uint32_t page_bits);
void wpsync_deinit(struct wpsync *w);

/* The handler's thread: until stop_fd is readable (0), or -errno. */
int wpsync_run(struct wpsync *w);
/* Returns once the loop runs: nothing may be protected before. */
void wpsync_await_run(struct wpsync *w);

/* Protect all of range index. 0 or -errno. */
int wpsync_protect(struct wpsync *w, uint32_t index);

/*
 * Move the bits of one block into `into` and protect those pages again in its ranges [first, first + count).
 * `noted` is emptied into the block's bitmap before. New bits in `into`, or -errno; nothing is lost then.
 */
int64_t wpsync_take(struct wpsync *w, uint32_t first, uint32_t count, uint64_t *noted, uint64_t *into);

uint64_t wpsync_faults(struct wpsync *w);

#endif
