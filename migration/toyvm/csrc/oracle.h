/* SPDX-License-Identifier: MIT */
/* Fills guest RAM with the oracle's pages, and judges all of it. */
#ifndef TOYVM_ORACLE_H
#define TOYVM_ORACLE_H

#include "guard.h"
#include "page.h"

/* Pages a device owns and verifies itself; the sweep leaves them out. */
struct oracle_range {
	uint32_t block;
	uint32_t pad;
	uint64_t first;
	uint64_t count;
};

struct oracle_sweep {
	/* in */
	const struct toy_layout *layout;
	const uint64_t *base;                   /* host address of each block */
	const uint64_t *logs;                   /* address of each vCPU's uint32_t log; 0: all zero */
	const uint64_t *populated;              /* of each block a bitmap's address, or 0: see below */
	const struct oracle_range *skip;
	uint32_t skip_count;
	uint32_t bad_room;
	struct toy_bad *bad;                    /* the first bad_room bad pages */
	/* out */
	uint64_t pages_checked;
	uint64_t errors;
	uint32_t by_damage[DAMAGE_KINDS];
	/* where it is */
	uint32_t block;
	uint64_t page;
	struct guard guard;
	struct toy_share shares[TOY_MAX_SMP];
};

/* Every oracle page new, all counters 0. Pages not filled are left alone. The guest must not run. */
void oracle_fill(const struct toy_layout *layout, const uint64_t *base);

/*
 * All pages of all blocks. Pages that were never filled are zero without a look where the block's populated
 * bitmap has no bit for them: a look would make the kernel map them. The guest must not run. Sleeps on missing pages; a poisoned one counts as lost.
 * Needs guard_install. Returns the number of bad pages, at most INT64_MAX.
 */
int64_t oracle_sweep(struct oracle_sweep *sweep);

/* The verdict on one page's 4096 bytes, wherever they are; for tests and for offline looks at a snapshot. */
int oracle_judge(const struct toy_layout *layout, uint32_t block, uint64_t page, const void *bytes,
		 uint32_t expected);

#endif
