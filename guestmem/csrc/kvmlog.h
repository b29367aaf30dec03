/* SPDX-License-Identifier: MIT */
/*
 * KVM's dirty log: one bit per guest page of a memory slot. It sees what vCPUs write, and
 * nothing that the VMM writes itself.
 */
#ifndef GUESTMEM_KVMLOG_H
#define GUESTMEM_KVMLOG_H

#include <stdbool.h>
#include <stdint.h>

struct kvmlog_slot {
	uint32_t slot;		/* address space << 16 | number */
	uint32_t flags;		/* KVM_MEM_*, without the logging flag */
	uint64_t guest_address;
	uint64_t length;	/* bytes */
	uint64_t host;
};

/*
 * Ask for reading and clearing in two steps. 1: granted, 0: this kernel has one step only, or
 * -errno. Once granted it stays so for this VM.
 */
int kvmlog_enable_manual_protect(int vm_fd);

/* Set the slot up again with the same geometry, logging on or off. 0 or -errno. */
int kvmlog_set_logging(int vm_fd, const struct kvmlog_slot *slot, bool enabled);

/*
 * Read the slot's log into scratch (BITMAP_WORDS(npages) words, overwritten), protect what it
 * names again, and set the bits in map from first_bit on. manual: what
 * kvmlog_enable_manual_protect() answered. Returns how many bits are new, or -errno.
 */
int64_t kvmlog_collect(int vm_fd, uint32_t slot, bool manual, uint64_t *scratch, uint64_t npages,
		       uint64_t *map, uint64_t first_bit);

#endif
