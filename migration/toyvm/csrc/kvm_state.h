/* SPDX-License-Identifier: MIT */
/* A KVM vCPU's architectural state, in the kernel's own layouts. */
#ifndef TOYVM_KVM_STATE_H
#define TOYVM_KVM_STATE_H

#include "kvm.h"

#define KVM_STATE_MSRS 32u

struct kvm_state_msr {
	uint64_t index;
	uint64_t value;
};

struct kvm_state {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_debugregs debugregs;
	struct kvm_xcrs xcrs;
	struct kvm_vcpu_events events;
	struct kvm_xsave xsave;
	uint64_t mp_state;
	uint64_t msr_count;
	struct kvm_state_msr msrs[KVM_STATE_MSRS];
	uint8_t stack[GUEST_STACK_BYTES];
};

/* At the start of the program, with nothing done. */
int kvm_state_reset(struct kvm_vcpu *vcpu);

/* Let KVM finish what the last exit left half done (the step over a store that left): once after each run. */
void kvm_state_commit(struct kvm_vcpu *vcpu);

/*
 * Only while parked. Both return 0 or -errno. restore accepts nothing but user-mode code on our own page
 * tables: a guest that got itself into kernel mode could sleep where no kick reaches it (-EINVAL).
 */
int kvm_state_save(struct kvm_vcpu *vcpu, struct kvm_state *out);
int kvm_state_restore(struct kvm_vcpu *vcpu, const struct kvm_state *state);

#endif
