// SPDX-License-Identifier: MIT
#include "place.h"

#include <errno.h>
#include <string.h>

#include "memory.h"
#include "ranges.h"
#include "uffd.h"

void place_count(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

void place_forget(struct fault_handler *h, uint64_t address, uint64_t len)
{
	if (h->pending)
		pending_remove_range(h->pending, address, len);
}

void place_wake(struct fault_handler *h, uint64_t address, uint64_t len)
{
	uffd_wake(h->uffd, address, len);
	place_forget(h, address, len);
}

/*
 * On hugetlb the kernel copies with faults switched off; if the source is not mapped in, it takes a second
 * huge page to copy through, and says ENOMEM when the pool has but one. So map the source in and ask again.
 */
static int64_t copy_bytes(struct fault_handler *h, const struct fault_range *r, uint64_t at,
			  uint64_t source, uint64_t len)
{
	int64_t rc = uffd_copy(h->uffd, at, source, len, 0);

	if (rc == -ENOMEM && r->page_size > 4096 && mem_populate_read(source, len) == 0)
		rc = uffd_copy(h->uffd, at, source, len, 0);
	return rc;
}

static int64_t place_zeros(struct fault_handler *h, const struct fault_range *r, uint64_t at,
			   uint64_t len)
{
	int64_t rc = -EINVAL;

	if (r->page_size == 4096)
		rc = uffd_zeropage(h->uffd, at, len, 0);
	if (rc == -EINVAL)	/* hugetlb has no zero page; one host page at a time */
		rc = copy_bytes(h, r, at, (uintptr_t)h->zeros, r->page_size);
	if (rc > 0)
		place_count(&h->stats.zero_bytes, (uint64_t)rc);
	return rc;
}

/* The last page of a source that ends inside it: the rest is zeros, and never read from the source. */
static int64_t place_tail(struct fault_handler *h, const struct fault_range *r, uint64_t at)
{
	uint64_t offset = at - r->start;
	uint64_t have = r->source_len - offset;

	memcpy(h->staging, (const void *)(uintptr_t)(r->source + offset), have);
	memset(h->staging + have, 0, r->page_size - have);
	return copy_bytes(h, r, at, (uintptr_t)h->staging, r->page_size);
}

static int64_t place_copy(struct fault_handler *h, const struct fault_range *r, uint64_t at,
			  uint64_t len)
{
	uint64_t offset = at - r->start;
	uint64_t whole;

	if (offset >= r->source_len)
		return place_zeros(h, r, at, r->page_size);
	whole = (r->source_len - offset) / r->page_size * r->page_size;
	if (whole == 0)
		return place_tail(h, r, at);
	return copy_bytes(h, r, at, r->source + offset, len < whole ? len : whole);
}

/* Place something at at, at most len bytes; what uffd_copy() and its kin answer. */
static int64_t place_some(struct fault_handler *h, const struct fault_range *r, uint64_t at,
			  uint64_t len, uint64_t chunk, bool minor)
{
	uint64_t run;

	if (minor)
		return uffd_continue(h->uffd, at, r->page_size, 0);
	if (ranges_removed_run(r, at, len, &run))
		return place_zeros(h, r, at, run);
	switch (r->kind) {
	case FAULT_SOURCE_COPY:
		return place_copy(h, r, at, run);
	case FAULT_SOURCE_FETCH:
		return copy_bytes(h, r, at, (uintptr_t)h->staging + (at - chunk), run);
	default:
		/* PAGE_CACHE: absent from the file too, so it is a hole, and holes read as zeros. */
		return place_zeros(h, r, at, run);
	}
}

/* EEXIST. 0 when the page is really there (its sleepers are woken), -ENOMEM for an empty hugetlb pool. */
static int settle_present(struct fault_handler *h, const struct fault_range *r, uint64_t at)
{
	if (r->page_size > 4096 && !(h->flags & FAULT_FOREIGN) &&
	    mem_resident(at, r->page_size) == 0)
		return -ENOMEM;
	place_count(&h->stats.already_present, 1);
	place_wake(h, at, r->page_size);
	return 0;
}

int place_chunk(struct fault_handler *h, const struct fault_range *r, uint64_t chunk, uint64_t len,
		bool minor)
{
	uint64_t at = chunk;

	while (at < chunk + len) {
		int64_t got = place_some(h, r, at, chunk + len - at, chunk, minor);

		if (got > 0) {
			place_count(&h->stats.placed_bytes, (uint64_t)got);
			place_forget(h, at, (uint64_t)got);
			at += (uint64_t)got;
			continue;
		}
		if (got != -EEXIST)
			return (int)got;
		got = settle_present(h, r, at);
		if (got < 0)
			return (int)got;
		at += r->page_size;
	}
	return 0;
}
