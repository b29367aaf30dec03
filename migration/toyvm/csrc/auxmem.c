/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "auxmem.h"

#include <errno.h>
#include <sys/mman.h>

#include "touch.h"

int64_t aux_map(uint64_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int err;

	if (p == MAP_FAILED)
		return -errno;
	if (madvise(p, bytes, MADV_DONTFORK) || madvise(p, bytes, MADV_DONTDUMP)) {
		err = -errno;
		munmap(p, bytes);
		return err;
	}
	return (int64_t)(uintptr_t)p;
}

int aux_unmap(uint64_t address, uint64_t bytes)
{
	return munmap((void *)(uintptr_t)address, bytes) ? -errno : 0;
}

uint64_t toy_slots_of(const struct toy_layout *layout, uint32_t owner)
{
	return toy_slots(layout, owner);
}

uint32_t toy_bucket_of(uint64_t ns)
{
	return histogram_bucket(ns);
}
