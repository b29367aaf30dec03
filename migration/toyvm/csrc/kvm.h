/* SPDX-License-Identifier: MIT */
/*
 * Real KVM vCPUs running a small long-mode guest at CPL 3.
 *
 * The guest does what the thread vCPUs do, by the same inline code: same pages, log, workloads, histogram.
 * It never enters its own kernel mode, because under a page-table-virtual KVM that would be emulated
 * instruction by instruction, and a fault taken by the emulator cannot be interrupted. It leaves for the
 * host rarely: to stop, or to be given its next share of a limited rate.
 *
 * Guest virtual = guest physical addresses. Registered guest RAM is one slot per block; everything else
 * the guest touches (code, stack, page tables, the aux memory, received bitmaps) lies in other slots.
 */
#ifndef TOYVM_KVM_H
#define TOYVM_KVM_H

#include <linux/kvm.h>

#include "gate.h"
#include "guard.h"
#include "kvmring.h"
#include "pace.h"
#include "toy.h"
#include "vcpu.h"

/* Guest physical map. RAM blocks follow from 4 GiB on, each on a 1 GiB border. */
#define GUEST_BOOT 0x00100000ull
#define GUEST_AUX 0x40000000ull
#define GUEST_RECEIVED 0x80000000ull
#define GUEST_RECEIVED_STEP 0x08000000ull       /* bitmap of up to 4 TiB of RAM */
#define GUEST_DOORBELL 0xD0000000ull            /* no slot: a store here leaves for the host */
#define GUEST_RAM 0x100000000ull
#define GUEST_GIB 0x40000000ull

/* Pages of the boot slot. */
#define BOOT_CODE_PAGE 1u
#define BOOT_CODE_PAGES 4u
#define BOOT_VCPU_PAGE 8u                       /* per vCPU: a shared page and a stack page */
#define BOOT_TABLES_PAGE 256u                   /* PML4, PDPT, then a PD for each GiB */

#define GUEST_STACK_BYTES TOY_PAGE_BYTES

/* Why the guest rings: offsets from GUEST_DOORBELL. */
enum guest_bell { BELL_STOP = 0, BELL_GRANT = 8 };

enum kvm_slot { SLOT_BOOT, SLOT_AUX, SLOT_RAM, SLOT_RECEIVED = SLOT_RAM + TOY_MAX_BLOCKS };

/* What host and guest say to each other, in the vCPU's shared page. */
struct guest_shared {
	struct toy_view view;                   /* guest addresses */
	uint64_t index;
	uint64_t stop;                          /* host to guest: leave between two operations */
	uint64_t granted;                       /* operations the guest may do while it is limited */
	uint64_t ns_per_tick;                   /* 32.32 fixed point */
};

struct kvm_vm {
	int32_t fd;
	uint32_t smp;
	uint64_t boot;                          /* host address of the boot slot */
	uint64_t boot_bytes;
	uint64_t run_bytes;                     /* of a vCPU's run page */
	uint64_t ram_gpa[TOY_MAX_BLOCKS];
	struct kvmring ring;                    /* without entries: the VM has none */
};

struct kvm_vcpu {
	struct gate gate;
	struct guard guard;
	struct pace pace;
	struct kvm_vm *vm;
	struct kvm_run *run;
	struct guest_shared *shared;
	struct toy_view host;                   /* host addresses */
	uint64_t ticks_per_s;
	uint64_t tick_offset;                   /* host's tick counter minus the guest's */
	int32_t fd;
	uint32_t index;
	uint32_t status;                        /* enum vcpu_status */
	uint32_t exit_reason;                   /* of a VCPU_FAILED */
	int32_t error;
	uint64_t lost_address;
	uint64_t last_op_ns;
	uint64_t last_op_realtime_ns;
};

/* Creates the VM with its boot and aux slots and page tables. `pages` are the blocks' target pages,
 * `base` their host addresses. `ring_entries`: of each vCPU's dirty ring, a power of two; 0: none, the VM
 * has a dirty log. 0 or -errno; after an error nothing is left. */
int kvm_vm_init(struct kvm_vm *vm, uint32_t smp, uint32_t blocks, const uint64_t *base,
		const uint64_t *pages, uint64_t aux, uint64_t aux_bytes, uint32_t ring_entries);
struct kvmring *kvm_vm_ring(struct kvm_vm *vm); /* NULL: none */
void kvm_vm_deinit(struct kvm_vm *vm);
int kvm_vm_set_slot(struct kvm_vm *vm, uint32_t slot, uint64_t gpa, uint64_t bytes, uint64_t host,
		    uint32_t flags);
uint64_t kvm_vm_code_bytes(void);
uint64_t kvm_vm_code(const struct kvm_vm *vm);  /* host address of the guest's program */

/* `host` has the vCPU's addresses as for vcpu_init; `aux` is the aux memory's host address. */
int kvm_vcpu_init(struct kvm_vcpu *vcpu, struct kvm_vm *vm, uint32_t index,
		  const struct toy_view *host, uint64_t aux);
void kvm_vcpu_deinit(struct kvm_vcpu *vcpu);

/* As their namesakes in vcpu.h. */
int kvm_vcpu_serve(struct kvm_vcpu *vcpu);
void kvm_vcpu_go(struct kvm_vcpu *vcpu);
void kvm_vcpu_ask_halt(struct kvm_vcpu *vcpu);
void kvm_vcpu_halt(struct kvm_vcpu *vcpu);
void kvm_vcpu_quit(struct kvm_vcpu *vcpu);
bool kvm_vcpu_is_running(const struct kvm_vcpu *vcpu);

/* CLOCK_MONOTONIC of a tick count the guest wrote; 0 stays 0. */
uint64_t kvm_vcpu_tick_ns(const struct kvm_vcpu *vcpu, uint64_t ticks);

/* Where the guest sees block `number`'s bitmap; 0 takes it away. Only while every vCPU is parked. */
int kvm_vm_set_received(struct kvm_vm *vm, uint32_t number, uint64_t host, uint64_t bytes,
			uint64_t *guest_out);

#endif
