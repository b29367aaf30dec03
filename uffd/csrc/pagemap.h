/* SPDX-License-Identifier: MIT */
/*
 * Reading page tables through /proc: pagemap entries, PAGEMAP_SCAN (Linux 6.7) and PROCMAP_QUERY
 * (Linux 6.11). The fds are opened by the caller: /proc/PID/pagemap, /proc/PID/maps.
 */
#ifndef UFFD_PAGEMAP_H
#define UFFD_PAGEMAP_H

#include <stdint.h>

struct pagemap_region {
	uint64_t start;
	uint64_t end;		/* exclusive */
	uint64_t categories;
};

struct pagemap_scan_args {
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

struct procmap_info {
	uint64_t start;
	uint64_t end;
	uint64_t flags;
	uint64_t page_size;
	uint64_t offset;
	uint64_t inode;
	uint32_t dev_major;
	uint32_t dev_minor;
};

/* Count of entries read into entries[], one per base page from the page of address; or -errno. */
int64_t pagemap_read(int fd, uint64_t address, uint64_t page_size, uint64_t *entries,
		     uint32_t count);

/*
 * Regions filled in (0 with max_regions 0), or -errno. *walk_end tells where the walk stopped: equal
 * to args->end when it is complete.
 */
int64_t pagemap_scan(int fd, const struct pagemap_scan_args *args, struct pagemap_region *regions,
		     uint64_t max_regions, uint64_t *walk_end);

/* 0, or -errno (-ENOENT: nothing matches). name may be NULL with name_size 0; it is terminated. */
int procmap_query(int fd, uint64_t address, uint64_t query_flags, char *name, uint32_t name_size,
		  struct procmap_info *info);

#endif
