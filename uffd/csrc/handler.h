/* SPDX-License-Identifier: MIT */
/*
 * A fault loop that answers page faults of one userfaultfd without any interpreter.
 *
 * Ranges say where the bytes of missing pages come from. One thread calls fault_handler_run(), which
 * returns when stop_fd becomes readable (0) or when a page cannot be had (-errno, failed_address);
 * whoever sleeps on that page keeps sleeping. It never invents a page. Running again is safe: the loop
 * starts by waking every range, so faults whose message was already read are reported anew.
 *
 * What the loop settles by itself:
 *   - duplicates: two threads on one page send two messages; both are read before the page is placed,
 *     so the one placement wakes both and the second message is dropped;
 *   - EEXIST: somebody else placed the page. The kernel wakes nobody then, so the loop does. On hugetlb
 *     the same code can mean that the pool is empty: the page is looked at, and -ENOMEM ends the loop;
 *   - EAGAIN: an event waits to be read. The fault is put aside, events are read, then it is retried;
 *   - REMOVE: pages the owner gave back (madvise) come back as zeros, not as their old bytes. Events are
 *     applied before the faults read with them, because the kernel hands out faults first;
 *   - REMAP and UNMAP: ranges follow the mapping.
 * Everything else (FORK and the rest of the events, faults outside every range, write-protect faults)
 * goes into a ring that another thread empties, told by notify_fd.
 */
#ifndef UFFD_HANDLER_H
#define UFFD_HANDLER_H

#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>

#include "pending.h"
#include "uffd_abi.h"

enum fault_source {
	FAULT_SOURCE_COPY = 1,		/* bytes at an address of ours */
	FAULT_SOURCE_PAGE_CACHE = 2,	/* the mapped file already has them: MINOR faults, CONTINUE */
	FAULT_SOURCE_ZERO = 3,
	FAULT_SOURCE_FETCH = 4,		/* ask the fetch function */
};

struct fault_range {
	uint64_t start;
	uint64_t len;
	uint64_t page_size;	/* host page: placed whole */
	uint64_t unit;		/* bytes placed per fault, a multiple of page_size: read-ahead */
	uint64_t source;	/* COPY: address of start's bytes; FETCH: offset of start */
	uint64_t source_len;	/* COPY: bytes there; what lies beyond reads as zeros */
	uint32_t kind;
	uint32_t reserved;
	uint64_t first_bit;	/* of this range in the bitmap below */
	uint64_t *removed;	/* bit per host page: given back by its owner */
};

/* Fill len bytes that belong to offset; 0 or -errno. Called on the thread of fault_handler_run(). */
typedef int (*fault_fetch_fn)(void *context, uint64_t offset, void *into, uint64_t len);

#define FAULT_LATENCY_BUCKETS 40u	/* bucket i: [2^i, 2^(i+1)) ns from message read to page placed */

struct fault_stats {
	uint64_t missing;
	uint64_t minor;
	uint64_t duplicates;
	uint64_t placed_bytes;
	uint64_t zero_bytes;
	uint64_t already_present;
	uint64_t retries;		/* EAGAIN answers */
	uint64_t vanished;		/* the range went away before the page came */
	uint64_t removes;
	uint64_t remaps;
	uint64_t unmaps;
	uint64_t forks;
	uint64_t passed_on;
	uint64_t events_dropped;
	uint64_t serve_ns_total;
	uint64_t serve_ns_max;
	uint64_t latency[FAULT_LATENCY_BUCKETS];
};

#define FAULT_QUEUE_MAX 1024u
#define FAULT_EVENTS_MAX 1024u		/* power of two */
#define FAULT_SPARE_RANGES 64u		/* room for what REMAP and UNMAP split */

struct fault_item {
	uint64_t address;
	uint64_t since_ns;
	uint32_t flags;
	uint32_t tid;
	bool done;
};

#define FAULT_FOREIGN 1u	/* the memory is another process's: residency cannot be looked at */

struct fault_handler {
	int uffd;
	int stop_fd;
	int notify_fd;		/* eventfd, or -1 */
	uint32_t flags;
	uint32_t range_count;
	uint32_t range_max;
	uint32_t queued;
	uint32_t removed_map_count;
	struct fault_range *ranges;
	uint64_t **removed_maps;	/* what the ranges' bitmaps were allocated as */
	struct fault_item *queue;
	struct uffd_msg *events;
	uint32_t events_head;	/* written by the loop */
	uint32_t events_tail;	/* written by the reader */
	uint8_t *staging;	/* one largest unit */
	uint8_t *zeros;		/* one largest host page, never written */
	uint64_t staging_len;
	fault_fetch_fn fetch;
	void *context;
	struct pending_faults *pending;		/* may be NULL */
	sem_t begun;		/* up by one for each run */
	uint64_t failed_address;
	struct fault_stats stats;
};

/* ranges are copied. 0, -EINVAL (geometry), -ENOMEM. The fds stay the caller's. */
int fault_handler_init(struct fault_handler *h, int uffd, int stop_fd, int notify_fd,
		       const struct fault_range *ranges, uint32_t count, uint32_t flags);
void fault_handler_deinit(struct fault_handler *h);

int fault_handler_run(struct fault_handler *h);
/* Wait until a run has begun: the thread that was started for it may still have to wait for an
 * interpreter lock, and whoever holds that must not touch a missing page before. */
void fault_handler_await_run(struct fault_handler *h);

/* Safe from any thread while the loop runs. */
void fault_handler_stats(const struct fault_handler *h, struct fault_stats *out);
/* Takes up to max messages out of the ring; one reader at a time. */
uint32_t fault_handler_take_events(struct fault_handler *h, struct uffd_msg *out, uint32_t max);

#endif
