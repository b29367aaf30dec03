/* SPDX-License-Identifier: MIT */
/*
 * What uffd/csrc/touch.h leaves to guest memory: read-modify-write and copies inside guest
 * RAM. The thread may sleep in the kernel on a missing page; the binding called it without
 * the interpreter lock.
 */
#ifndef GUESTMEM_ACCESS_H
#define GUESTMEM_ACCESS_H

#include <stdint.h>

uint64_t access_fetch_add_u64(uint64_t address, uint64_t value);	/* address: multiple of 8 */
void access_move(uint64_t dst, uint64_t src, uint64_t len);		/* may overlap */

#endif
