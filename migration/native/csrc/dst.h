/*
 * The destination's data plane: from the bytes of the stream to pages in place, and from a fault to a
 * request on the return path. Nothing here takes the GIL, so a thread that sleeps on a missing page while
 * holding it is served like any other.
 *
 *   dst_load_ram    main thread, before LISTEN: one section's records straight into RAM
 *   dst_multifd_loop a multifd channel's thread, before LISTEN: packets straight into RAM (dst_multifd.c)
 *   dst_listen_loop listen thread: sections, commands and records, placing whole host pages
 *   dst_fault_loop  fault thread: messages of the userfaultfd, one request per page
 */
#ifndef MIG_DST_H
#define MIG_DST_H

#include "blocktime.h"
#include "chan.h"
#include "pending.h"
#include "ramrec.h"
#include "watchdog.h"

#include <semaphore.h>

#define DST_NO_BLOCK UINT32_MAX
#define DST_RUN_BYTES (64u << 10)	/* pages placed by one COPY */

struct dst_block {
	char idstr[256];
	uint8_t id_len;
	uint8_t *host;			/* NULL: pages are written to fd */
	uint64_t used_length;
	uint64_t page_size;		/* host page */
	uint64_t *received;		/* bit per target page: placed (or known zero) */
	uint64_t *requested;		/* bit per target page: asked for over the return path */
	int32_t fd;			/* backing file, -1 for anonymous */
	uint8_t is_shared;
	uint8_t is_hugetlb;
};

/* Counters, read by any thread at any time: see dst_count. */
struct dst_stats {
	uint64_t pages_normal;		/* target pages that came with data */
	uint64_t pages_zero;
	uint64_t precopy_pages;		/* of both, those before LISTEN */
	uint64_t host_pages_placed;
	uint64_t requests;		/* host pages asked for */
	uint64_t faults;		/* missing-page messages */
	uint64_t duplicate_faults;	/* of these, on a page already asked for */
	uint64_t resolved_locally;	/* on a page already received: woken or filled with its zeros */
	uint64_t minor_faults;
	uint64_t requests_by_main;	/* requests by the loading main thread before RUN */
	uint64_t pings;
	uint64_t latency_ns_sum, latency_count;	/* request written -> page placed */
	uint64_t latency_dist[24];	/* bucket n: [2^n, 2^(n+1)) microseconds, the last one open */
};

/* Others look at a counter while it moves. */
static inline void dst_count(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

#define DST_TRACK 4096			/* outstanding requests that are timed */

struct src;
struct dst;
struct dst_multifd;

/* What is read from one channel: by one thread at a time. */
struct dst_rx {
	struct dst *d;
	struct chan *ch;
	uint32_t last_block;		/* for CONTINUE */
	bool ended_cleanly;		/* closed between records, as a preempt channel is */

	/* the host page being assembled (host pages larger than a target page) */
	uint8_t *hp_data;
	uint64_t *hp_have;		/* bit per target page of it */
	uint32_t hp_block;
	uint64_t hp_offset, hp_count;
	bool hp_all_zero;

	/* neighbouring target pages not placed yet, all zero or all data */
	uint32_t run_block;
	uint64_t run_offset, run_length;
	bool run_is_zero;
	uint8_t *run_data;

	struct dst_stats stats;		/* its part of the counters */
	struct mig_error error;
};

struct dst {
	sem_t loops_begun;	/* up by one for each loop that is in C */
	struct chan *_Atomic ch;	/* the main channel: requests and PONGs go out on it */
	struct dst_rx main, urgent;
	struct dst_multifd *multifd;	/* NULL: no such channels */
	struct dst_block *blocks;
	uint32_t *by_address;		/* block indexes sorted by host address */
	uint32_t block_count;
	uint32_t ram_section_id;
	uint64_t hp_capacity;

	int uffd;			/* -1 before LISTEN */
	atomic_int stop_fd;		/* eventfd: the fault loop ends */
	int run_fd;			/* eventfd: RUN came alone (negotiated) */
	int32_t main_tid;		/* thread that loads the devices; 0 after RUN */
	atomic_bool running;
	atomic_bool rp_broken;		/* requests are kept, not sent */
	atomic_bool expect_run;		/* RUN is legal on the main stream */

	uint32_t last_requested_block;	/* under the channel's wlock */

	uint8_t *zero_page;		/* capacity bytes of zeros, for hugetlb */

	struct dst_track { _Atomic uint64_t page, since_ns; atomic_bool by_other; } track[DST_TRACK];
	struct blocktime blocktime;
	bool sink;			/* pages are stored, nobody runs here */
	struct src *relay_to;		/* told of every page that came; may be NULL */
	atomic_int arrival_fd;		/* sink: an eventfd that counts arrivals; -1: nobody looks */
	struct pending_faults *pending;	/* who sleeps where: the watchdog reads it */
	struct watchdog *watchdog;	/* told that no page will come when the stream is lost */
	struct dst_stats stats;
	struct mig_error fault_error;	/* of the fault thread */
};

enum dst_event {		/* what dst_listen_loop returns when it is not an error */
	DST_EOF = 0,		/* the EOF byte was read */
	DST_COMMAND = 1,	/* an unread command is next: Python's */
	DST_SECTION = 2,	/* an unread section that is not RAM's is next: Python's */
};

struct dst *dst_new(struct chan *ch, uint32_t block_count, uint64_t max_page_size, int *err);
void dst_free(struct dst *d);
int dst_set_block(struct dst *d, uint32_t index, const char *idstr, uint64_t host, uint64_t used_length,
		  uint64_t page_size, uint64_t received, uint64_t requested, int fd, int is_shared,
		  int is_hugetlb);
void dst_seal(struct dst *d);			/* all blocks are set */
void dst_set_ram_section(struct dst *d, uint32_t section_id);
void dst_set_channel(struct dst *d, struct chan *ch);	/* a new one after a pause */
/* pending, watchdog: addresses of uffd's struct pending_faults and struct watchdog (0: none). */
void dst_start_postcopy(struct dst *d, int uffd, int stop_fd, int run_fd, int32_t main_tid,
			uint64_t pending, uint64_t watchdog);
void dst_set_running(struct dst *d);
void dst_get_stats(const struct dst *d, struct dst_stats *out);
/* Whose waiting is counted as blocktime (thread ids of the vCPUs); out gets the present figures. */
void dst_set_vcpus(struct dst *d, const int32_t *tids, uint32_t count);
void dst_get_blocktime(struct dst *d, uint64_t *all_ns, uint64_t *vcpu_ns, uint64_t *vcpu_faults,
		       uint64_t *other_ns, uint64_t *other_faults);

/* The preempt channel (set before LISTEN or after, but before its loop). Framed: from its first byte. */
void dst_set_urgent_channel(struct dst *d, struct chan *ch);
/*
 * Capability multifd, with count channels; before dst_multifd_loop runs, once for each. each_section: the source
 * is one of 8.0 or older, every EOS is a point where all channels meet. Else only MULTIFD_FLUSH is.
 */
int dst_multifd_init(struct dst *d, uint32_t count, bool each_section);
void dst_multifd_set_channel(struct dst *d, uint32_t index, struct chan *ch);
int dst_multifd_loop(struct dst *d, uint32_t index);	/* 0: ended or stopped; -errno, see dst_multifd_error */
/* The main thread: until all channels stand at a SYNC; then they go on. Its error is in d->main.error. */
int dst_multifd_sync(struct dst *d);
void dst_multifd_stop(struct dst *d);		/* any thread: the loops end, and nobody waits for them */
const struct mig_error *dst_multifd_error(const struct dst *d, uint32_t index);
/* Records up to and including EOS. mig_error in d->main.error, d->urgent.error, d->fault_error. */
int dst_load_ram(struct dst *d);
int dst_listen_loop(struct dst *d);
/*
 * Wait until so many of the loops (listen, urgent, fault) have begun in C. A thread that has started may
 * still need the interpreter lock to get here; whoever may touch a missing page with that lock held waits
 * for all of them first. Returns 0 or -ETIMEDOUT.
 */
int dst_await_loops(struct dst *d, uint32_t count, uint32_t timeout_s);
int dst_urgent_loop(struct dst *d);	/* 0: the source ended it */
int dst_fault_loop(struct dst *d);
/* Ask again for everything that was asked for and has not come (after a resume). Returns the count or -errno. */
int64_t dst_request_again(struct dst *d);
/* Poison every page that is still missing, so that its sleepers get SIGBUS, never zeros. Count of target pages. */
int64_t dst_poison_missing(struct dst *d);
uint64_t dst_missing_pages(const struct dst *d);
int dst_pong(struct dst *d, uint32_t value);

/* Nobody runs here: pages are stored as they come, also after LISTEN. relay_to may be NULL. */
void dst_set_sink(struct dst *d, struct src *relay_to);
/* From now on this eventfd is written whenever pages came, after their received bits went up. -1: none. */
void dst_set_arrival_fd(struct dst *d, int fd);
/* Ask for one stretch over the return path (a relay passing on what it was asked for). 0 or -errno. */
int dst_ask(struct dst *d, uint32_t index, uint64_t offset, uint32_t length);

/* For a page size in KiB. */
#define DST_NO_HUGE_PAGE "no free huge page of %llu KiB to place it in; raise nr_hugepages, then recover the migration"

/* Internal between the files of this side. */
bool dst_pool_is_dry(const struct dst_block *b, uint64_t offset);
int dst_store_run(struct dst_rx *rx, struct dst_block *b, uint64_t offset, const uint8_t *data, uint64_t length);
int dst_load_xbzrle(struct dst_rx *rx, struct dst_block *b, uint64_t offset, const uint8_t *in, uint32_t len);
int dst_put_request(struct dst *d, struct chan *ch, uint32_t index, uint64_t offset, uint32_t length);
uint64_t dst_page_key(const struct dst *d, uint32_t index, uint64_t offset);
int dst_records(struct dst_rx *rx, bool placing);
int dst_flush_run(struct dst_rx *rx);
int dst_find_block(const struct dst_rx *rx, const char *id, uint32_t len);
void dst_multifd_free(struct dst *d);
void dst_multifd_add_stats(const struct dst *d, void (*add)(struct dst_stats *, const struct dst_stats *),
			   struct dst_stats *out);
/* What a MULTIFD_FLUSH and an EOS mean before LISTEN. */
int dst_multifd_at_flush(struct dst *d);
int dst_multifd_at_eos(struct dst *d);
int dst_find_address(const struct dst *d, uint64_t address, uint32_t *block, uint64_t *offset);
void dst_track_add(struct dst *d, uint64_t page, int32_t tid);
void dst_track_done(struct dst_rx *rx, uint64_t page);
void dst_track_forget(struct dst *d, uint64_t page);
int dst_place_zero_local(struct dst *d, const struct dst_block *b, uint64_t offset);

#endif
