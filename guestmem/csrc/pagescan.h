/* SPDX-License-Identifier: MIT */
/*
 * Dirty tracking by the kernel's asynchronous write protection: the first write to a
 * protected page drops its protection, and one PAGEMAP_SCAN finds such pages and protects
 * them again, page by page in one step, so that no write falls between finding and
 * protecting. The range must be registered for write-protect with a userfaultfd that has
 * the WP_ASYNC and WP_UNPOPULATED features, and protected once with UFFDIO_WRITEPROTECT:
 * a scan does not protect the holes of hugetlb, and reading those would look like writing.
 */
#ifndef GUESTMEM_PAGESCAN_H
#define GUESTMEM_PAGESCAN_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Find the pages of [start, start + length) written since they were last protected, protect
 * them again, and set their bits: bit 0 of map is the target page (1 << page_bits bytes) at
 * base, bits from nbits on do not exist. Returns how many bits are new, or -errno; pages
 * found before an error have their bits set.
 * skip_absent: a page that does not exist is not written, protected or not. For private memory only: there a
 * page that was written stays in the page table, in swap at the least, until it is discarded.
 * -EPERM: a mapping in the range is not (or no longer) in asynchronous write-protect mode.
 */
int64_t pagescan_collect(int pagemap_fd, uint64_t base, uint64_t start, uint64_t length,
			 uint64_t *map, uint64_t nbits, uint32_t page_bits, bool skip_absent);

/*
 * Set the bits of pages that the page table has, in memory or in swap; protects nothing.
 * Absent pages, markers on them and the shared zero page all read as zero and do not count.
 */
int64_t pagescan_populated(int pagemap_fd, uint64_t start, uint64_t length, uint64_t *map,
			   uint64_t nbits, uint32_t page_bits);

#endif
