// SPDX-License-Identifier: MIT
#include "pagescan.h"

#include <errno.h>
#include <stdbool.h>

#include "bitmap.h"
#include "pagemap.h"

/* Numbers of the kernel interface (Linux 6.7), under names of our own. */
#define SCAN_WP_MATCHING	(1u << 0)
#define SCAN_CHECK_WPASYNC	(1u << 1)
#define PAGE_WPALLOWED		(1u << 0)
#define PAGE_WRITTEN		(1u << 1)
#define PAGE_PRESENT		(1u << 3)
#define PAGE_SWAPPED		(1u << 4)
#define PAGE_PFNZERO		(1u << 5)

/*
 * A pagemap entry with the swapped bit has its swap type in the low five bits; the last type is
 * no swap file but stands for markers left on absent pages (write-protect, poison, guard).
 */
#define ENTRY_SWAPPED		(UINT64_C(1) << 62)
#define ENTRY_SWAP_TYPE		UINT64_C(0x1f)
#define ENTRY_MARKER		UINT64_C(0x1f)
#define ENTRIES 512

/* Regions taken per call: 12 KiB of stack, and few calls even for a scattered writer. */
#define REGIONS 512

struct target {
	uint64_t *map;
	uint64_t nbits;
	uint64_t start;
	uint32_t page_bits;
};

static int64_t mark_range(const struct target *t, uint64_t start, uint64_t end)
{
	uint64_t first = (start - t->start) >> t->page_bits;
	uint64_t last = (end - t->start) >> t->page_bits;

	/* The last huge page may reach past the part of the block in use. */
	if (last > t->nbits)
		last = t->nbits;
	return first < last ? (int64_t)bitmap_set_count(t->map, first, last - first) : 0;
}

static int64_t mark_written(int pagemap_fd, const struct target *t,
			    const struct pagemap_region *region)
{
	(void)pagemap_fd;
	return mark_range(t, region->start, region->end);
}

/* Swap entries or markers: only the entries themselves tell. */
static int64_t mark_swapped(int pagemap_fd, const struct target *t,
			    const struct pagemap_region *region)
{
	uint64_t entries[ENTRIES], page = UINT64_C(1) << t->page_bits, at = region->start;
	int64_t fresh = 0;

	while (at < region->end) {
		uint64_t left = (region->end - at) >> t->page_bits;
		int64_t n = pagemap_read(pagemap_fd, at, page, entries,
					 left < ENTRIES ? left : ENTRIES);

		if (n <= 0)
			return n < 0 ? n : -EIO;
		for (int64_t i = 0; i < n; i++, at += page)
			if ((entries[i] & ENTRY_SWAPPED) &&
			    (entries[i] & ENTRY_SWAP_TYPE) != ENTRY_MARKER)
				fresh += mark_range(t, at, at + page);
	}
	return fresh;
}

static int64_t mark_populated(int pagemap_fd, const struct target *t,
			      const struct pagemap_region *region)
{
	if (region->categories & PAGE_PFNZERO)
		return 0;
	if (region->categories & PAGE_PRESENT)
		return mark_range(t, region->start, region->end);
	return mark_swapped(pagemap_fd, t, region);
}

/* What to do with a region found: count of new bits or -errno. */
typedef int64_t (*mark_fn)(int pagemap_fd, const struct target *t,
			   const struct pagemap_region *region);

/* Walks args' range to its end. Returns the count of new bits or -errno. */
static int64_t walk(int pagemap_fd, struct pagemap_scan_args *args, const struct target *t,
		    mark_fn mark)
{
	struct pagemap_region regions[REGIONS];
	int64_t fresh = 0;

	while (args->start < args->end) {
		uint64_t walk_end = args->start;
		int64_t n = pagemap_scan(pagemap_fd, args, regions, REGIONS, &walk_end);

		if (n < 0)
			return n;
		for (int64_t i = 0; i < n; i++) {
			int64_t rc = mark(pagemap_fd, t, &regions[i]);

			if (rc < 0)
				return rc;
			fresh += rc;
		}
		/* A kernel that stands still would hold us here for ever. */
		if (walk_end <= args->start)
			return -EIO;
		args->start = walk_end;
	}
	return fresh;
}

int64_t pagescan_collect(int pagemap_fd, uint64_t base, uint64_t start, uint64_t length,
			 uint64_t *map, uint64_t nbits, uint32_t page_bits, bool skip_absent)
{
	const struct target target = { map, nbits, base, page_bits };
	struct pagemap_scan_args args = {
		.flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
		.start = start,
		.end = start + length,
		/*
		 * WRITTEN alone is not enough: some kernels report it for any page without a
		 * write-protect bit, tracked or not.
		 */
		.category_mask = PAGE_WPALLOWED | PAGE_WRITTEN,
		.category_anyof_mask = skip_absent ? PAGE_PRESENT | PAGE_SWAPPED : 0,
		.return_mask = PAGE_WRITTEN,
	};

	return walk(pagemap_fd, &args, &target, mark_written);
}

int64_t pagescan_populated(int pagemap_fd, uint64_t start, uint64_t length, uint64_t *map,
			   uint64_t nbits, uint32_t page_bits)
{
	const struct target target = { map, nbits, start, page_bits };
	struct pagemap_scan_args args = {
		.start = start,
		.end = start + length,
		.category_anyof_mask = PAGE_PRESENT | PAGE_SWAPPED,
		.return_mask = PAGE_PRESENT | PAGE_SWAPPED | PAGE_PFNZERO,
	};

	return walk(pagemap_fd, &args, &target, mark_populated);
}
