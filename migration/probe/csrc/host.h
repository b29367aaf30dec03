/* SPDX-License-Identifier: MIT */
/* What checks need of the host that Python's library lacks. >= 0 or -errno; stateless. */
#ifndef PROBE_HOST_H
#define PROBE_HOST_H

#include <stdint.h>

/* Whoever changes its user loses its own /proc/self to root; this takes it back. */
int host_keep_proc(void);

/* The kernel kills this process when the thread that forked it ends. -ESRCH: it has ended already. */
int host_die_with_parent(int parent);

/*
 * May this process lock len bytes? Maps that much without touching it, locks it "on fault" (which is
 * counted against RLIMIT_MEMLOCK but brings no page), and unmaps it again.
 */
int host_can_lock(uint64_t len);

#endif
