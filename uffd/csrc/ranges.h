/* SPDX-License-Identifier: MIT */
/* The fault loop's table of ranges: lookup, and keeping up with madvise, mremap and munmap. */
#ifndef UFFD_RANGES_H
#define UFFD_RANGES_H

#include "handler.h"

/* 0, -EINVAL, -ENOMEM. */
int ranges_init(struct fault_handler *h, const struct fault_range *ranges, uint32_t count);
void ranges_deinit(struct fault_handler *h);

struct fault_range *ranges_find(struct fault_handler *h, uint64_t address);

void ranges_mark_removed(struct fault_handler *h, uint64_t start, uint64_t end);
/* -ENOSPC when the table has no room for the pieces. */
int ranges_move(struct fault_handler *h, uint64_t from, uint64_t to, uint64_t len);
int ranges_drop(struct fault_handler *h, uint64_t start, uint64_t end);

/* True if the host page at address was given back; *run is set to how many bytes, up to limit, agree. */
bool ranges_removed_run(const struct fault_range *r, uint64_t address, uint64_t limit, uint64_t *run);

#endif
