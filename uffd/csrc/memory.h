/* SPDX-License-Identifier: MIT */
/*
 * The memory calls around userfaultfd that Python's library lacks or makes unsafe: mappings by
 * address, advice, hole punching, residency, process fds. >= 0 or -errno. Stateless.
 */
#ifndef UFFD_MEMORY_H
#define UFFD_MEMORY_H

#include <stdint.h>

int mem_map(uint64_t hint, uint64_t len, int prot, int flags, int fd, uint64_t offset,
	    uint64_t *address_out);
int mem_unmap(uint64_t start, uint64_t len);
int mem_remap(uint64_t start, uint64_t old_len, uint64_t new_len, int flags, uint64_t target,
	      uint64_t *address_out);
int mem_protect(uint64_t start, uint64_t len, int prot);

int mem_madvise(uint64_t start, uint64_t len, int advice);
/* ranges: count pairs {start, len}. Returns bytes advised, which may be short. */
int64_t mem_process_madvise(int pidfd, const uint64_t *ranges, uint32_t count, int advice);

int mem_memfd_create(const char *name, uint32_t flags);
/* f_type and f_bsize: hugetlbfs tells its page size here and nowhere else. */
int mem_fstatfs(int fd, uint64_t *type_out, uint64_t *block_out);
int mem_fallocate(int fd, int mode, uint64_t offset, uint64_t len);
/* One byte per base page of the range, bit 0 = resident. */
int mem_mincore(uint64_t start, uint64_t len, uint8_t *vector);
/* 1 when every base page of the range is resident, 0 when one is not, or -errno. */
int mem_resident(uint64_t start, uint64_t len);

/* Fault in the base pages that overlap the range, for reading (MADV_POPULATE_READ, Linux 5.14). */
int mem_populate_read(uint64_t start, uint64_t len);

int mem_pidfd_open(int pid, uint32_t flags);
int mem_pidfd_getfd(int pidfd, int target_fd);

#endif
