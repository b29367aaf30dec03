// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

/* Ranges per system call: what fits the stack comfortably; the kernel's own limit is 1024. */
enum { VECTOR_MAX = 64 };

int mem_map(uint64_t hint, uint64_t len, int prot, int flags, int fd, uint64_t offset,
	    uint64_t *address_out)
{
	void *p = mmap((void *)(uintptr_t)hint, len, prot, flags, fd, (off_t)offset);

	if (p == MAP_FAILED)
		return -errno;
	*address_out = (uintptr_t)p;
	return 0;
}

int mem_unmap(uint64_t start, uint64_t len)
{
	return munmap((void *)(uintptr_t)start, len) < 0 ? -errno : 0;
}

int mem_remap(uint64_t start, uint64_t old_len, uint64_t new_len, int flags, uint64_t target,
	      uint64_t *address_out)
{
	void *p = mremap((void *)(uintptr_t)start, old_len, new_len, flags,
			 (void *)(uintptr_t)target);

	if (p == MAP_FAILED)
		return -errno;
	*address_out = (uintptr_t)p;
	return 0;
}

int mem_protect(uint64_t start, uint64_t len, int prot)
{
	return mprotect((void *)(uintptr_t)start, len, prot) < 0 ? -errno : 0;
}

int mem_madvise(uint64_t start, uint64_t len, int advice)
{
	return madvise((void *)(uintptr_t)start, len, advice) < 0 ? -errno : 0;
}

int64_t mem_process_madvise(int pidfd, const uint64_t *ranges, uint32_t count, int advice)
{
	struct iovec vector[VECTOR_MAX];
	int64_t total = 0;
	uint32_t done = 0;

	do {
		uint32_t n = count - done < VECTOR_MAX ? count - done : VECTOR_MAX;
		uint64_t wanted = 0;
		long got;

		for (uint32_t i = 0; i < n; i++) {
			vector[i].iov_base = (void *)(uintptr_t)ranges[2 * (done + i)];
			vector[i].iov_len = ranges[2 * (done + i) + 1];
			wanted += vector[i].iov_len;
		}
		got = syscall(SYS_process_madvise, pidfd, vector, (unsigned long)n, advice, 0u);
		if (got < 0)
			return total > 0 ? total : -errno;
		total += got;
		if ((uint64_t)got < wanted)
			return total;
		done += n;
	} while (done < count);
	return total;
}

int mem_memfd_create(const char *name, uint32_t flags)
{
	int fd = memfd_create(name, flags);

	return fd >= 0 ? fd : -errno;
}

int mem_fstatfs(int fd, uint64_t *type_out, uint64_t *block_out)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) < 0)
		return -errno;
	*type_out = (uint64_t)fs.f_type;
	*block_out = (uint64_t)fs.f_bsize;
	return 0;
}

int mem_fallocate(int fd, int mode, uint64_t offset, uint64_t len)
{
	return fallocate(fd, mode, (off_t)offset, (off_t)len) < 0 ? -errno : 0;
}

int mem_mincore(uint64_t start, uint64_t len, uint8_t *vector)
{
	return mincore((void *)(uintptr_t)start, len, vector) < 0 ? -errno : 0;
}

int mem_resident(uint64_t start, uint64_t len)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	uint8_t vector[512];

	while (len > 0) {
		uint64_t step = len < sizeof(vector) * page ? len : sizeof(vector) * page;
		int rc = mem_mincore(start, step, vector);

		if (rc < 0)
			return rc;
		for (uint64_t i = 0; i < (step + page - 1) / page; i++)
			if (!(vector[i] & 1))
				return 0;
		start += step;
		len -= step;
	}
	return 1;
}

int mem_populate_read(uint64_t start, uint64_t len)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	uint64_t from = start & ~(page - 1);

	return mem_madvise(from, (start + len - from + page - 1) & ~(page - 1), MADV_POPULATE_READ);
}

int mem_pidfd_open(int pid, uint32_t flags)
{
	long fd = syscall(SYS_pidfd_open, pid, flags);

	return fd >= 0 ? (int)fd : -errno;
}

int mem_pidfd_getfd(int pidfd, int target_fd)
{
	long fd = syscall(SYS_pidfd_getfd, pidfd, target_fd, 0u);

	return fd >= 0 ? (int)fd : -errno;
}
