// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "numa.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FLAG_ADDRESS	(1u << 1)	/* get_mempolicy: of the mapping at an address */
#define FLAG_STRICT	(1u << 0)
#define FLAG_MOVE	(1u << 1)

int64_t numa_set_policy(uint64_t start, uint64_t len, int32_t mode, const uint64_t *nodes)
{
	/* The kernel takes one bit less than it is told. */
	const uint64_t *mask = mode == NUMA_DEFAULT ? NULL : nodes;
	unsigned long count = mask ? NUMA_MAX_NODES + 1 : 0;

	if (syscall(SYS_mbind, start, len, mode, mask, count, FLAG_STRICT | FLAG_MOVE) < 0)
		return -errno;
	return 0;
}

int64_t numa_get_policy(uint64_t address, int32_t *mode, uint64_t *nodes)
{
	if (syscall(SYS_get_mempolicy, mode, nodes, (unsigned long)NUMA_MAX_NODES, address, FLAG_ADDRESS) < 0)
		return -errno;
	return 0;
}
