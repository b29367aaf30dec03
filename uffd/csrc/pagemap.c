// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "pagemap.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Layouts and numbers of the kernel interface, under names of our own: the build host may not have them. */
struct abi_scan {
	uint64_t size;
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end;
	uint64_t vec;
	uint64_t vec_len;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

struct abi_procmap {
	uint64_t size;
	uint64_t query_flags;
	uint64_t query_addr;
	uint64_t vma_start;
	uint64_t vma_end;
	uint64_t vma_flags;
	uint64_t vma_page_size;
	uint64_t vma_offset;
	uint64_t inode;
	uint32_t dev_major;
	uint32_t dev_minor;
	uint32_t vma_name_size;
	uint32_t build_id_size;
	uint64_t vma_name_addr;
	uint64_t build_id_addr;
};

#define ABI_PAGEMAP_SCAN	_IOWR('f', 16, struct abi_scan)
#define ABI_PROCMAP_QUERY	_IOWR('f', 17, struct abi_procmap)

_Static_assert(sizeof(struct pagemap_region) == 24, "page_region is 24 bytes");
_Static_assert(ABI_PAGEMAP_SCAN == 0xC0606610, "PAGEMAP_SCAN");
_Static_assert(ABI_PROCMAP_QUERY == 0xC0686611, "PROCMAP_QUERY");

int64_t pagemap_read(int fd, uint64_t address, uint64_t page_size, uint64_t *entries,
		     uint32_t count)
{
	off_t at = (off_t)(address / page_size * sizeof(*entries));
	ssize_t got = pread(fd, entries, count * sizeof(*entries), at);

	return got < 0 ? -errno : got / (ssize_t)sizeof(*entries);
}

int64_t pagemap_scan(int fd, const struct pagemap_scan_args *args, struct pagemap_region *regions,
		     uint64_t max_regions, uint64_t *walk_end)
{
	struct abi_scan op = {
		.size = sizeof(op),
		.flags = args->flags,
		.start = args->start,
		.end = args->end,
		.vec = (uintptr_t)regions,
		.vec_len = max_regions,
		.max_pages = args->max_pages,
		.category_inverted = args->category_inverted,
		.category_mask = args->category_mask,
		.category_anyof_mask = args->category_anyof_mask,
		.return_mask = args->return_mask,
	};
	int got = ioctl(fd, ABI_PAGEMAP_SCAN, &op);

	if (got < 0)
		return -errno;
	*walk_end = op.walk_end;
	return got;
}

int procmap_query(int fd, uint64_t address, uint64_t query_flags, char *name, uint32_t name_size,
		  struct procmap_info *info)
{
	struct abi_procmap op = {
		.size = sizeof(op),
		.query_flags = query_flags,
		.query_addr = address,
		.vma_name_size = name_size,
		.vma_name_addr = name_size > 0 ? (uintptr_t)name : 0,
	};

	if (ioctl(fd, ABI_PROCMAP_QUERY, &op) < 0)
		return -errno;
	/* The size comes back as 0 for a mapping without a name; the buffer is then untouched. */
	if (name_size > 0 && op.vma_name_size == 0)
		name[0] = '\0';
	*info = (struct procmap_info){
		.start = op.vma_start,
		.end = op.vma_end,
		.flags = op.vma_flags,
		.page_size = op.vma_page_size,
		.offset = op.vma_offset,
		.inode = op.inode,
		.dev_major = op.dev_major,
		.dev_minor = op.dev_minor,
	};
	return 0;
}
