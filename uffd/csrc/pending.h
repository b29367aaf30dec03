/* SPDX-License-Identifier: MIT */
/*
 * Outstanding faults: which thread sleeps on which page, since when. Written by the loop that reads
 * fault messages and by whoever places pages, read by the watchdog; all at once, without locks.
 *
 * The table is a hint, by design. A page may be placed between the moment its message is read and the
 * moment the entry is added, so an entry can outlive its sleeper; who acts on one looks at the page
 * (mem_resident) and at the thread first. A full table drops new entries and counts them.
 */
#ifndef UFFD_PENDING_H
#define UFFD_PENDING_H

#include <stdbool.h>
#include <stdint.h>

#define PENDING_SLOTS 512u

struct pending_entry {
	uint64_t address;	/* 0: free; ~0: being filled in */
	uint64_t since_ns;	/* CLOCK_MONOTONIC */
	uint32_t tid;		/* 0: the context has no THREAD_ID feature */
	uint32_t reserved;
};

struct pending_faults {
	uint32_t count;		/* of entries in use; lets the hot path skip an empty table */
	uint32_t reserved;
	uint64_t dropped;
	struct pending_entry entries[PENDING_SLOTS];
};

_Static_assert(sizeof(struct pending_entry) == 24, "pending_entry is 24 bytes");

void pending_init(struct pending_faults *tbl);

/*
 * A thread waits for one page at a time: an entry of the same tid is overwritten, keeping since_ns
 * when the address is the same too (a fault reported again). With tid 0 the address is the key.
 * 0, or -ENOSPC when the table is full.
 */
int pending_add(struct pending_faults *tbl, uint64_t addr, uint32_t tid);

/* Forget every entry in [addr, addr + len). Returns how many there were. */
uint32_t pending_remove_range(struct pending_faults *tbl, uint64_t addr, uint64_t len);

/* The entry waiting longest. False when there is none. */
bool pending_oldest(const struct pending_faults *tbl, struct pending_entry *out);

/* Copies up to max entries, in no order; returns the count. */
uint32_t pending_list(const struct pending_faults *tbl, struct pending_entry *out, uint32_t max);

#endif
