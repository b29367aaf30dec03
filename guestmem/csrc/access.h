/* SPDX-License-Identifier: MIT */
/*
 * Loads and stores in guest RAM that come back. The thread may sleep in the kernel on a missing page, so
 * the binding calls everything here without the interpreter lock. A page that will never come answers
 * SIGBUS: poisoned because its migration was given up, a huge page the pool does not have, a file cut
 * short. Then the access ends in the middle and says where, instead of taking the process with it.
 *
 * A signal handler finds its state only through the thread it runs on, and signal actions are the
 * process's: so access.c keeps two thread-local records and, between install and uninstall, one action.
 * A SIGBUS outside these accesses goes to the action that was there before.
 */
#ifndef GUESTMEM_ACCESS_H
#define GUESTMEM_ACCESS_H

#include <stdint.h>

struct access_u64 {
	uint64_t value;
	int32_t result;		/* 0 or -EFAULT */
};

/* Counted. While installed, the functions below are safe on lost pages. 0 or -errno. */
int access_install(void);
void access_uninstall(void);

/* 0, or -EFAULT with a part done: access_last_lost() tells where it stopped. */
int access_read(uint64_t address, void *into, uint64_t len);
int access_write(uint64_t address, const void *from, uint64_t len);
int access_fill(uint64_t address, uint8_t value, uint64_t len);
int access_move(uint64_t dst, uint64_t src, uint64_t len);		/* may overlap */
int access_is_zero(uint64_t address, uint64_t len);			/* 0, 1 or -EFAULT */
/* Atomic; address: multiple of 8. */
struct access_u64 access_load_u64(uint64_t address);
int access_store_u64(uint64_t address, uint64_t value);
struct access_u64 access_fetch_add_u64(uint64_t address, uint64_t value);

/* Address where this thread's last failed access stopped. */
uint64_t access_last_lost(void);

#endif
