/* SPDX-License-Identifier: MIT */
/*
 * The smallest KVM guest that can be asked a question: one vCPU, three programs of a few
 * instructions each, no kernel. It runs them at CPL 0 or 3, because some hosts run the two in very
 * different ways. x86-64 only; elsewhere every call is -EOPNOTSUPP.
 *
 * No globals. One thread at a time, but guest_run() may sleep for as long as a page is missing and
 * other threads may answer the fault meanwhile.
 */
#ifndef PROBE_GUEST_H
#define PROBE_GUEST_H

#include <stdint.h>

struct kvm_run;

enum guest_program {
	GUEST_SPIN,	/* count down from argument */
	GUEST_LOAD,	/* read 8 bytes at RAM offset argument; out.value is what the guest saw */
	GUEST_STORE,	/* write GUEST_STORE_VALUE at RAM offset argument */
};

#define GUEST_STORE_VALUE 0x5ca1ab1e0ddba11ull
#define GUEST_RAM_SLOT 1
#define GUEST_SPIN_INSTRUCTIONS 2	/* per count */

struct guest {
	int32_t system, vm, vcpu;
	uint32_t ring_entries;	/* 0: dirty log instead of dirty ring */
	uint32_t ring_next;	/* where the next entry will appear */
	uint64_t run_bytes, ram_bytes;
	struct kvm_run *run;
	uint8_t *boot;		/* program and page tables, guest physical 0 */
	uint8_t *ram;		/* the caller's memory, guest physical GUEST_RAM */
	void *ring;
};

struct guest_answer {
	uint64_t value;		/* what the guest wrote to the doorbell */
	uint64_t ns;		/* processor time of KVM_RUN, the guest's included */
	uint32_t exit_reason;	/* KVM_EXIT_MMIO when all went well */
	uint32_t reserved;
};

/*
 * Show ram (bytes, a multiple of the base page, at most 512 MiB) to a new guest, with writes logged: in
 * KVM's bitmap, or in a ring of ring_bytes (a power of two) if not 0. step_out says how far it came
 * (enum guest_step) when the result is -errno.
 */
int guest_init(struct guest *g, uint64_t ram, uint64_t ram_bytes, uint32_t ring_bytes,
	       uint32_t *step_out);
void guest_deinit(struct guest *g);

enum guest_step {
	GUEST_STEP_OPEN,	/* /dev/kvm, and its API version */
	GUEST_STEP_VM,		/* KVM_CREATE_VM */
	GUEST_STEP_RING,	/* the dirty ring */
	GUEST_STEP_MEMORY,	/* memory slots */
	GUEST_STEP_VCPU,	/* KVM_CREATE_VCPU, its registers and run page */
};

/* Run one program to its end at CPL 0 or 3. -EINTR when a signal came first. */
int guest_run(struct guest *g, uint32_t program, uint32_t cpl, uint64_t argument,
	      struct guest_answer *out);

/*
 * The guest pages (of RAM) written since the last call: indices into pages, at most max of them.
 * Returns the count or -errno. Reads the ring if there is one, else the bitmap.
 */
int guest_dirty_pages(struct guest *g, uint64_t *pages, uint32_t max);

#endif
