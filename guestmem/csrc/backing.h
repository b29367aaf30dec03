/* SPDX-License-Identifier: MIT */
#ifndef GUESTMEM_BACKING_H
#define GUESTMEM_BACKING_H

#include <stdint.h>

#define BACKING_FS_HUGETLB	0x958458F6u
#define BACKING_FS_TMPFS	0x01021994u

struct backing_info {
	uint64_t fs_magic;
	/* On hugetlbfs the file's page size; elsewhere a hint about I/O that says nothing of pages. */
	uint64_t block_size;
	uint64_t free_blocks;
	uint64_t total_blocks;	/* 0 on a tmpfs without a limit */
};

/* What the file system of an open file says (statfs). 0 or -errno. */
int backing_statfs(int fd, struct backing_info *info);

#endif
