/*
 * The source's data plane: dirty pages to the stream, requests from the return path.
 *
 *   src_send_part      migration thread: one PART (or END) section of RAM, up to a number of bytes
 *   src_postcopy_loop  migration thread: requested pages first, then the scan, until nothing is dirty
 *   src_rp_loop        return-path thread: requests, PONGs, SHUT
 *
 * Who serves a request: the return-path thread puts it into a ring and tries the channel's lock. If it
 * gets it (the stream is idle) it sends the page itself, which saves waking another thread; if not, the
 * migration thread is sending a batch and looks at the ring before the next. Neither ever waits for the
 * other: after giving up the lock a thread looks at the ring once more.
 *
 * Before postcopy pages may go out over multifd channels instead (src_multifd.c): the migration thread hands
 * batches of them out, and a thread for each channel sends them, src_multifd_loop.
 *
 * With a preempt channel requested pages have it to themselves, as records without sections. Then two threads
 * send pages at once; who clears the first dirty bit of a host page sends all of it.
 */
#ifndef MIG_SRC_H
#define MIG_SRC_H

#include "chan.h"
#include "multifd.h"
#include "ramrec.h"

#define SRC_NO_BLOCK UINT32_MAX
#define SRC_NO_HINT UINT64_MAX
#define SRC_RING 4096u
#define SRC_ADVICE 1024u
#define SRC_PONGS 64u
#define SRC_BATCH_BYTES (64u << 10)	/* records put out before the lock is given up */

struct src_block {
	char idstr[256];
	uint8_t id_len;
	const uint8_t *host;
	uint64_t used_length;
	uint64_t page_size;
	uint64_t *dirty;		/* bit per target page: not sent; sent when asked for */
	uint64_t *scan;			/* of these, what the scan pushes unasked (may be dirty itself) */
	int32_t fd;			/* backing file, -1 for private memory; for release */
	uint8_t release;		/* give pages back to the host once they are sent in postcopy */
	uint64_t *wanted;		/* relay: asked for before it came; NULL otherwise */
};

/* One request as it came, for a working-set record. */
struct src_log_entry {
	uint32_t block, count;
	uint64_t first;			/* target page */
	uint64_t ns;			/* since the package went out */
};

struct src_stats {
	uint64_t pages_normal, pages_zero;	/* target pages sent */
	uint64_t postcopy_pages;		/* of both, those in postcopy */
	uint64_t requests;			/* page requests that came */
	uint64_t requested_pages;		/* target pages sent because asked for */
	uint64_t duplicate_requests;		/* for pages sent before: ignored */
	uint64_t advised_pages;			/* target pages pushed first because a policy said so */
	uint64_t served_direct;			/* requests answered by the return-path thread itself */
	uint64_t precopy_bytes, downtime_bytes, postcopy_bytes;
	uint64_t xbzrle_pages, xbzrle_bytes, xbzrle_misses, xbzrle_overflows, xbzrle_same;
	uint64_t released_pages;
	uint64_t run_sent_ns;			/* CLOCK_MONOTONIC, when RUN went out alone */
};

struct src_request {
	uint32_t block;
	uint64_t first, count;		/* target pages */
};

struct dst;
struct src_multifd;

/* Who looks whether a page is zero: nobody; who puts the record; the multifd channel's thread. */
enum src_zero { SRC_ZERO_NONE, SRC_ZERO_RECORD, SRC_ZERO_MULTIFD };

/* What is written to one channel: under that channel's wlock. */
struct src_tx {
	struct chan *ch;
	uint32_t last_block;		/* the peer's "last block" of this channel */
};

struct src {
	struct chan *ch;		/* the main channel: sections, commands, the return path */
	struct src_tx main;
	struct src_tx urgent;		/* the preempt channel; ch is NULL without one */
	struct src_block *blocks;
	uint32_t block_count;
	uint32_t ram_section_id;

	/* under the main channel's wlock */
	uint32_t scan_block;
	uint64_t scan_page;
	atomic_bool postcopy, ended;	/* ended: what is still asked for is zero there as it is here */
	atomic_bool stream_ended;	/* the END section is out; a preempt channel may go on */
	_Atomic uint64_t scan_hint;	/* where the scan goes on: a page sent on the urgent channel */

	/* requests: pushed by the return path, popped under wlock */
	struct src_request ring[SRC_RING];
	_Atomic uint32_t ring_head, ring_tail;
	uint32_t last_requested_block;	/* return-path thread */
	pthread_mutex_t ring_lock;	/* pushers: the return path, and a relay's other leg */
	struct src_log_entry *log;	/* the caller's, or NULL */
	uint64_t log_capacity;
	_Atomic uint64_t log_count;
	uint64_t package_ns;
	const struct src_request *prefetch;	/* the caller's: pushed before the scan */
	uint64_t prefetch_count, prefetch_at;
	struct src_request advice[SRC_ADVICE];	/* a policy's: before the scan, as far as still dirty */
	_Atomic uint32_t advice_head, advice_tail;
	struct dst *upstream;		/* relay: where pages come from */
	atomic_bool more_coming;	/* relay: not done even when nothing is dirty */
	int kick_fd;			/* eventfd: the migration thread has something to do */
	int stop_fd;			/* eventfd: both loops end */

	/* XBZRLE: the pages as the destination has them; NULL = off */
	uint8_t *xb_pages;
	uint64_t *xb_tags;		/* (block << 40 | page) + 1 of each slot; 0 = empty */
	uint64_t xb_slots;
	bool xb_active;			/* from the second pass on */

	struct src_multifd *multifd;	/* NULL: no such channels */
	atomic_int zero;		/* enum src_zero */

	/* RUN sent alone after the package was acknowledged */
	atomic_bool run_wanted, run_due, run_sent;
	atomic_bool hold_background;	/* serve requests only */
	_Atomic uint64_t bytes_per_second;	/* of the scan in postcopy; 0 = no limit */

	pthread_mutex_t pong_lock;
	pthread_cond_t pong_cond;
	_Atomic uint32_t frame_after_pong;
	uint32_t pongs[SRC_PONGS];
	uint32_t pong_count;
	bool rp_ended;
	/* A peer that got RUN in the package loads its devices: they may ask for what the scan leaves out, and
	 * behind the END section nothing can be answered. */
	bool loading;
	bool run_told;			/* migration thread */

	/* release-ram */
	atomic_bool moved;		/* the guest never runs here again, as Python's is_committed() will say */
	bool releases;
	uint32_t release_block;		/* the sweep's place: migration thread */
	uint64_t release_page;

	atomic_bool shut_received;
	uint32_t shut_value;
	struct src_stats stats;
	struct mig_error error;		/* under the main channel's wlock */
	struct mig_error urgent_error;	/* under the urgent channel's */
	struct mig_error rp_error;	/* return-path thread */
};

enum src_event {
	SRC_RP_SHUT = 0,	/* SHUT was read; its value is src_shut_value() */
	SRC_RP_MESSAGE = 1,	/* an unread message of another type is next: Python's */
};

enum src_progress {
	SRC_ALL_SENT = 0,	/* nothing is dirty any more */
	SRC_RUN_SENT = 1,	/* told once: RUN went out; call again */
};

struct src *src_new(struct chan *ch, uint32_t block_count, int *err);
void src_free(struct src *s);
int src_set_block(struct src *s, uint32_t index, const char *idstr, uint64_t host, uint64_t used_length,
		  uint64_t page_size, uint64_t dirty);
void src_set_ram_section(struct src *s, uint32_t section_id);
void src_set_channel(struct src *s, struct chan *ch);
void src_set_urgent_channel(struct src *s, struct chan *ch);	/* NULL: none (any more) */
/*
 * Before the END section. with_eos: as a source of 7.2 does, nothing comes on the urgent channel any more.
 * Without: a newer QEMU waits until all it asked for has come, so requests are answered until SHUT. 0 or -errno.
 */
int src_end_urgent(struct src *s, bool with_eos);
/* Capability release-ram: pages of block index are dropped once sent, and the guest cannot come back. */
int src_set_release(struct src *s, uint32_t index, int fd);
/* Capability xbzrle: cache_bytes of pages are kept (a power of two). 0 or -ENOMEM. */
int src_xbzrle_init(struct src *s, uint64_t cache_bytes);
void src_xbzrle_activate(struct src *s);	/* a pass is through */
void src_set_zero_detection(struct src *s, int zero);	/* enum src_zero; pages handed out before are not asked */
/*
 * Capability multifd, with count channels; before src_multifd_loop runs, once for each. each_section: as a
 * source of 8.0 and older, every EOS is a point where all channels meet. Else only a flush is.
 */
int src_multifd_init(struct src *s, uint32_t count, bool each_section);
void src_multifd_set_channel(struct src *s, uint32_t index, struct chan *ch);
int src_multifd_loop(struct src *s, uint32_t index);	/* 0: told to end; -errno, see src_multifd_error */
/* Everything handed out goes out, and behind it a SYNC on every channel. */
int src_multifd_sync(struct src *s);
/* Between two looks at what the guest wrote, so that a page cannot overtake itself: a PART that makes the
 * destination wait for all channels, if anything went out since the last one. */
int src_multifd_flush(struct src *s);
void src_multifd_stop(struct src *s);		/* any thread: the loops end, pages go into records from now on */
const struct mig_error *src_multifd_error(const struct src *s, uint32_t index);
/* What the scan pushes of block index, when that is less than all that is dirty. */
int src_set_scan(struct src *s, uint32_t index, uint64_t scan);
void src_set_log(struct src *s, uint64_t entries, uint64_t capacity);
uint64_t src_log_count(const struct src *s);
void src_set_prefetch(struct src *s, uint64_t requests, uint64_t count);
/* Push these target pages before the scan goes on. One thread. 0, -EINVAL: no such pages, -EAGAIN: full. */
int src_advise(struct src *s, uint32_t block, uint64_t first, uint64_t count);
/* Pass requests for pages that have not come on to upstream; wanted: one bitmap address per block. */
void src_set_upstream(struct src *s, struct dst *upstream);
int src_set_wanted(struct src *s, uint32_t index, uint64_t wanted);
void src_set_more_coming(struct src *s, bool more);
int src_pages_came(struct src *s, uint32_t index, uint64_t offset, uint64_t length, bool is_zero);
void src_get_stats(const struct src *s, struct src_stats *out);
void src_stop(struct src *s);			/* any thread: both loops return -ECANCELED */
void src_set_hold(struct src *s, bool hold);
void src_set_rate(struct src *s, uint64_t bytes_per_second);
uint64_t src_dirty_pages(const struct src *s);

/* One section of type PART (2) or END (3) with up to max_bytes of records; target pages sent, or -errno. */
int64_t src_send_part(struct src *s, uint8_t type, uint64_t max_bytes);
/* The PACKAGED command, its bytes and what follows at once; from here on requests are served. */
int src_send_package(struct src *s, const void *stream, uint64_t length, bool run_alone);
/* Before the package: the loop is not done before the package's PONG came, over this channel. */
void src_await_loaded(struct src *s);
/* Any thread. Sleeps without the GIL until that is so. 0, or -EPIPE: the return path ended before. */
int src_wait_loaded(struct src *s);
int src_postcopy_loop(struct src *s);
int src_rp_loop(struct src *s);
/* The return path is framed from the byte after the PONG of this value on. 0 = never. */
void src_set_frame_after_pong(struct src *s, uint32_t value);
/* A PONG p with (p & mask) == value. Sleeps without the GIL. 0, -ETIMEDOUT, or -EPIPE: the return path ended. */
int src_wait_pong(struct src *s, uint32_t value, uint32_t mask, int32_t timeout_ms, uint32_t *out);
bool src_has_pong(struct src *s, uint32_t value);
bool src_run_sent(const struct src *s);
uint32_t src_shut_value(const struct src *s);

/* Internal. Under the main channel's wlock: send RUN when due, answer the ring unless urgent does. */
int src_serve_locked(struct src *s);
int src_serve_urgent(struct src *s);	/* takes the urgent channel's wlock */
bool src_has_advice(struct src *s);
bool src_next_advised(struct src *s, uint32_t *block, uint64_t *page);
/* Migration thread: one step of dropping what was sent before the guest moved. Whether more is to do. */
bool src_release_some(struct src *s);
void src_release_page(struct src *s, struct src_block *b, uint64_t offset, uint64_t length);
void src_xbzrle_free(struct src *s);
void src_xbzrle_zero(struct src *s, uint32_t index, uint64_t page);
/* Try to send the page as its difference. 1: sent or need not be; 0: send it whole; -errno. */
int src_xbzrle_put(struct src *s, struct src_tx *tx, uint32_t index, uint64_t page);
void src_multifd_free(struct src *s);
bool src_multifd_takes(const struct src *s);	/* pages go out over the channels */
int src_multifd_put(struct src *s, uint32_t index, uint64_t page);
uint64_t src_multifd_taken(const struct src *s);	/* bytes of pages handed out so far */
int src_multifd_end_section(struct src *s, bool is_end, bool *flush);
/* The page has not come yet: pass the request on. False: it was sent before, or there is no upstream. */
bool src_ask_upstream(struct src *s, uint32_t index, uint64_t page);
int src_serve_or_leave(struct src *s);
bool src_is_loading(struct src *s);
int src_push_request(struct src *s, const struct src_request *r);
void src_kick(struct src *s);

#endif
