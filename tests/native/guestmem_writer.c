// SPDX-License-Identifier: MIT
/*
 * A guest for the dirty-tracking tests: writes increasing counters into random pages until told
 * to stop. Loaded by ctypes, which calls it without the GIL, so it races the tracker for real.
 */
#include <stdint.h>

/* Returns how many writes were done. One 64-bit counter at the start of each page. */
uint64_t writer_run(uint64_t host, uint64_t page_bytes, uint64_t page_count, uint64_t seed,
		    const uint32_t *stop);

uint64_t writer_run(uint64_t host, uint64_t page_bytes, uint64_t page_count, uint64_t seed,
		    const uint32_t *stop)
{
	uint64_t state = seed | 1, writes = 0;

	while (!__atomic_load_n(stop, __ATOMIC_ACQUIRE)) {
		uint64_t page;

		state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
		page = (state >> 33) % page_count;
		writes++;
		__atomic_store_n((uint64_t *)(uintptr_t)(host + page * page_bytes), writes,
				 __ATOMIC_RELEASE);
	}
	return writes;
}
