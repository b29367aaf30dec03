// SPDX-License-Identifier: MIT
#include "collapse.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/mman.h>

/* Kernel interface (Linux 6.1). */
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
/* A page that is locked, on its way to another list or just being faulted in is soon free again. */
#define ATTEMPTS 3

static void bump(uint64_t *counter)
{
	__atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

static int collapse_one(uint64_t at, uint64_t huge)
{
	for (int i = 0; i < ATTEMPTS; i++) {
		if (madvise((void *)(uintptr_t)at, huge, MADV_COLLAPSE) == 0)
			return 0;
		if (errno != EAGAIN && errno != EBUSY)
			return errno;
	}
	return EBUSY;
}

static void count(struct collapse_stats *s, int error)
{
	bump(&s->tried);
	if (error == 0) {
		bump(&s->done);
		return;
	}
	bump(error == EBUSY ? &s->busy : error == ENOMEM ? &s->no_memory : &s->refused);
	__atomic_store_n(&s->last_error, error, __ATOMIC_RELAXED);
}

int collapse_range(struct collapse *c, uint64_t start, uint64_t length, uint64_t huge)
{
	uint64_t at = (start + huge - 1) & ~(huge - 1), end = (start + length) & ~(huge - 1);
	bool is_first = true;

	for (; at < end; at += huge) {
		int error;

		if (__atomic_load_n(&c->stop, __ATOMIC_ACQUIRE))
			return -ECANCELED;
		error = collapse_one(at, huge);
		if (error == EINVAL && is_first)
			return -EINVAL;
		is_first = false;
		count(&c->stats, error);
	}
	return 0;
}

void collapse_stop(struct collapse *c)
{
	__atomic_store_n(&c->stop, 1, __ATOMIC_RELEASE);
}

void collapse_get(const struct collapse *c, struct collapse_stats *out)
{
	const struct collapse_stats *s = &c->stats;

	out->tried = __atomic_load_n(&s->tried, __ATOMIC_RELAXED);
	out->done = __atomic_load_n(&s->done, __ATOMIC_RELAXED);
	out->busy = __atomic_load_n(&s->busy, __ATOMIC_RELAXED);
	out->no_memory = __atomic_load_n(&s->no_memory, __ATOMIC_RELAXED);
	out->refused = __atomic_load_n(&s->refused, __ATOMIC_RELAXED);
	out->last_error = __atomic_load_n(&s->last_error, __ATOMIC_RELAXED);
}
