// SPDX-License-Identifier: MIT
#include "backing.h"

#include <errno.h>
#include <sys/vfs.h>

int backing_statfs(int fd, struct backing_info *info)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) < 0)
		return -errno;
	*info = (struct backing_info){
		/* f_type is a signed word; the magic is its low half. */
		.fs_magic = (uint32_t)fs.f_type,
		.block_size = (uint64_t)fs.f_bsize,
		.free_blocks = fs.f_bavail,
		.total_blocks = fs.f_blocks,
	};
	return 0;
}
