// SPDX-License-Identifier: MIT
/* What the targets share: bytes into a channel, and memory nobody may write beyond. */
#ifndef FUZZ_FEED_H
#define FUZZ_FEED_H

#include "chan.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define FEED_MAX (96u << 10)	/* less than a socket buffer: sent without a reader */

#define MUST(condition) \
	do { \
		if (!(condition)) { \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			abort(); \
		} \
	} while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct feed {
	int fds[2];
	struct chan *ch;	/* the reader; what it writes is drained by nobody */
};

/* The reader finds exactly these bytes and then the end. Framed: in good frames of different sizes. */
static inline void feed_init(struct feed *f, const uint8_t *data, size_t size, bool framed)
{
	int err;

	MUST(size <= FEED_MAX);
	MUST(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, f->fds));
	f->ch = chan_new(f->fds[0], f->fds[0], true, &err);
	MUST(f->ch);
	if (framed) {
		struct chan *to = chan_new(f->fds[1], f->fds[1], true, &err);

		MUST(to && !chan_set_write_framed(to));
		for (size_t at = 0, n = 1; at < size; at += n, n = n * 3 % 4099 + 1) {
			if (n > size - at)
				n = size - at;
			MUST(!chan_write(to, data + at, n) && !chan_flush(to));
		}
		chan_free(to);
		chan_set_read_framed(f->ch);
	} else {
		MUST(send(f->fds[1], data, size, MSG_NOSIGNAL) == (ssize_t)size);
	}
	shutdown(f->fds[1], SHUT_WR);
}

static inline void feed_deinit(struct feed *f)
{
	chan_free(f->ch);
	close(f->fds[0]);
	close(f->fds[1]);
}

/* Memory between two unreadable pages, at a multiple of 64 KiB. */
static inline uint8_t *guarded(size_t bytes)
{
	size_t page = 4096, align = 64 << 10;
	uint8_t *p = mmap(NULL, bytes + 2 * align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	MUST(p != MAP_FAILED && bytes % page == 0);
	p += align - (uintptr_t)p % align;	/* at least a page before, and one behind */
	MUST(!mprotect(p, bytes, PROT_READ | PROT_WRITE) && !madvise(p, bytes, MADV_NOHUGEPAGE));
	return p;
}

#endif
