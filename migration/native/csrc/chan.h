/*
 * A channel: buffered bytes in both directions over one descriptor (or a pair), shared by Python, which
 * writes headers and loads devices through it, and the native loops, which take it over at LISTEN.
 *
 * Reading belongs to one thread at a time. Writing is under wlock: on the destination the fault, listen
 * and main threads all answer on the return path. Optionally both directions carry checksummed frames
 * (negotiated between our own ends): be32 length, be32 CRC-32C, payload. The sum covers the frame's
 * sequence number and length too, so a lost, repeated or reordered frame is found like a flipped bit.
 * Nothing of a frame is handed on before its sum was checked.
 *
 * Sockets stay blocking and are interrupted by shutdown(2); anything else must be O_NONBLOCK and is
 * waited for together with the abort eventfd.
 */
#ifndef MIG_CHAN_H
#define MIG_CHAN_H

#include "err.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define CHAN_PIECES 256			/* well below IOV_MAX */
#define CHAN_FRAME_MAX (128u << 10)	/* payload bytes in one frame */
#define CHAN_FRAME_HEADER 8u
#define CHAN_NEED_MAX (64u << 10)	/* contiguous bytes a reader may ask for */

struct chan {
	int rfd, wfd;
	bool is_socket;
	int abort_fd;
	atomic_bool aborted;

	/* reader: one thread */
	uint8_t *raw;			/* bytes as they came from the descriptor */
	size_t raw_cap, raw_head, raw_tail;
	const uint8_t *win;		/* checked bytes, contiguous, not consumed yet */
	size_t win_len;
	uint8_t *spill;			/* where leftovers of one frame meet the next */
	bool rframed;
	uint64_t rseq, rpos;
	_Atomic uint64_t received;	/* bytes off the descriptor */
	struct mig_error rerror;

	/* writer: under wlock */
	pthread_mutex_t wlock;
	uint8_t *wbuf;			/* frame header room, then payload */
	size_t wlen;
	bool wframed;
	uint64_t wseq, wpos;
	_Atomic uint64_t sent;		/* bytes to the descriptor */
	int werror;			/* -errno; sticks */
};

struct chan *chan_new(int rfd, int wfd, bool is_socket, int *err);
void chan_free(struct chan *c);			/* does not close the descriptors */
void chan_abort(struct chan *c);		/* any thread: readers and writers return -ECANCELED */
void chan_set_read_framed(struct chan *c);	/* from the next unread byte on */
int chan_set_write_framed(struct chan *c);	/* flushes, then from the next byte on */

/* Make at least n bytes (<= CHAN_NEED_MAX) contiguous at c->win. 0 or -errno (-ENODATA: clean end). */
int chan_need(struct chan *c, size_t n);
static inline void chan_skip(struct chan *c, size_t n)
{
	c->win += n;
	c->win_len -= n;
	c->rpos += n;
}
/* Exactly n bytes into buf; -ENODATA when the stream ended before. */
int chan_read(struct chan *c, void *buf, size_t n);
int64_t chan_read_some(struct chan *c, void *buf, size_t n);	/* 1..n bytes, what is there */
int64_t chan_peek(struct chan *c, void *buf, size_t n);	/* bytes copied, fewer only at the end */

/* Writers below are for callers that hold wlock. */
uint8_t *chan_reserve(struct chan *c, size_t n);	/* NULL when broken; n <= CHAN_FRAME_MAX */
static inline void chan_commit(struct chan *c, size_t n)
{
	c->wlen += n;
	c->wpos += n;
}
int chan_flush_locked(struct chan *c);
int chan_put_locked(struct chan *c, const void *data, size_t n);
/* These pieces (at most CHAN_PIECES) at once: from where they lie when plain, through frames otherwise. The
 * pieces are used up. A socket. */
int chan_send_pieces_locked(struct chan *c, struct iovec *pieces, int count);
/* And these take it. */
int chan_write(struct chan *c, const void *data, size_t n);
int chan_flush(struct chan *c);
void chan_lock(struct chan *c);
bool chan_trylock(struct chan *c);
void chan_unlock(struct chan *c);
uint64_t chan_read_position(const struct chan *c);
uint64_t chan_write_position(const struct chan *c);
uint64_t chan_bytes_received(const struct chan *c);	/* off the descriptor, frames included */
uint64_t chan_bytes_sent(const struct chan *c);

#endif
