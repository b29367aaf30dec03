/* SPDX-License-Identifier: MIT */
/* The fault loop's placing half: bytes into missing pages, whatever the kernel answers. */
#ifndef UFFD_PLACE_H
#define UFFD_PLACE_H

#include "handler.h"

/*
 * Fill [chunk, chunk + len), whole host pages of r, skipping those already there. FETCH ranges take the
 * bytes from h->staging. 0, -EAGAIN (an event waits; call again), other -errno.
 */
int place_chunk(struct fault_handler *h, const struct fault_range *r, uint64_t chunk, uint64_t len,
		bool minor);

/* Let the sleepers look again; a page that is still missing is reported anew. */
void place_wake(struct fault_handler *h, uint64_t address, uint64_t len);
void place_forget(struct fault_handler *h, uint64_t address, uint64_t len);

/* Counters have one writer, the loop; atomic so that statistics may be read meanwhile. */
void place_count(uint64_t *counter, uint64_t n);

#endif
