// SPDX-License-Identifier: MIT
#include "prealloc.h"

#include "access.h"
#include "memory.h"

#include <errno.h>
#include <stdlib.h>

#define ADVICE_POPULATE_WRITE 23	/* Linux 5.14 */
#define PART_BYTES (UINT64_C(16) << 20)	/* taken at a time: progress moves, and threads end together */

struct prealloc_job *prealloc_new(uint64_t start, uint64_t length, uint64_t page_size)
{
	struct prealloc_job *job = calloc(1, sizeof(*job));

	if (job) {
		job->start = start;
		job->length = length;
		job->page_size = page_size;
	}
	return job;
}

void prealloc_free(struct prealloc_job *job)
{
	free(job);
}

/* Before Linux 5.14: add nothing to a byte of each page, which changes no contents. */
static int64_t touch_pages(uint64_t start, uint64_t length, uint64_t page_size)
{
	for (uint64_t at = 0; at < length; at += page_size) {
		struct access_u64 found = access_fetch_add_u64(start + at, 0);

		if (found.result)
			return found.result;
	}
	return 0;
}

static int64_t populate(const struct prealloc_job *job, uint64_t offset, uint64_t length)
{
	int64_t ret;

	do
		ret = mem_madvise(job->start + offset, length, ADVICE_POPULATE_WRITE);
	while (ret == -EAGAIN || ret == -EINTR);
	return ret == -EINVAL ? touch_pages(job->start + offset, length, job->page_size) : ret;
}

int64_t prealloc_work(struct prealloc_job *job)
{
	uint64_t part = job->page_size > PART_BYTES ? job->page_size : PART_BYTES;

	for (;;) {
		uint64_t at = atomic_fetch_add(&job->next, part), length;
		int64_t ret, none = 0;

		if (at >= job->length || atomic_load(&job->error))
			return atomic_load(&job->error);
		length = job->length - at < part ? job->length - at : part;
		ret = populate(job, at, length);
		if (ret < 0)
			atomic_compare_exchange_strong(&job->error, &none, ret);
		else
			atomic_fetch_add(&job->done, length);
	}
}

void prealloc_stop(struct prealloc_job *job)
{
	int64_t none = 0;

	atomic_compare_exchange_strong(&job->error, &none, -ECANCELED);
}

uint64_t prealloc_done(const struct prealloc_job *job)
{
	return atomic_load(&job->done);
}
