/* SPDX-License-Identifier: MIT */
/* Where pages come from: memory policies of address ranges, by system call (no libnuma). */
#ifndef GUESTMEM_NUMA_H
#define GUESTMEM_NUMA_H

#include <stdint.h>

#define NUMA_MAX_NODES 1024u
#define NUMA_WORDS (NUMA_MAX_NODES / 64)

/* The kernel's numbers, under names of our own. */
enum numa_mode { NUMA_DEFAULT = 0, NUMA_PREFERRED = 1, NUMA_BIND = 2, NUMA_INTERLEAVE = 3 };

/*
 * Policy of [start, start + len); nodes: NUMA_WORDS words, bit per node, all zero for NUMA_DEFAULT. Pages that
 * are there already are moved; one that cannot be is -EIO. 0 or -errno.
 */
int64_t numa_set_policy(uint64_t start, uint64_t len, int32_t mode, const uint64_t *nodes);
/* Policy of the mapping at address. 0 or -errno. */
int64_t numa_get_policy(uint64_t address, int32_t *mode, uint64_t *nodes);

#endif
