/* SPDX-License-Identifier: MIT */
/* The thread that touches missing pages, shared by the local and the remote fault measurement. */
#ifndef POSTCOPY_BENCH_TOUCHER_H
#define POSTCOPY_BENCH_TOUCHER_H

#include <stdatomic.h>

#include "bench.h"

/* First word of every page placed: names the page, so that a touch proves what it woke up to. */
#define BENCH_STAMP UINT64_C(0x706f7374636f7079)

struct bench_toucher {
	struct bench_region *region;
	const struct bench_fault_config *config;
	uint64_t *samples_ns;
	uint64_t touches;
	uint64_t wrong;
	int64_t recorded;
	bool stamped_by_page; /* false: every page carries BENCH_STAMP itself */
	int stop_fd;	      /* eventfd written when the toucher is through */
	atomic_int *failed;   /* set by whoever cannot go on; 0 or -errno */
};

int bench_touch(void *arg);		/* thread body */
void bench_fail(atomic_int *failed, int err); /* the first error stays */

/* Wait for a fault message: sleep in poll, or spin. 1 = look at the userfaultfd, 0 = stop, -errno. */
int bench_await_fault(int uffd, int stop_fd, bool spins);

#endif
